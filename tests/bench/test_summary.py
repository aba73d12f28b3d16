"""The table that a run ends with fits its terminal, and says what its numbers mean."""

import io
import math
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from bench.summary import reuse_notes, seeds_table, summary_table

ROW = {
    **{"dataset": "glyphs", "ways": 5, "shots": 1, "seed": 0, "test_shots": 5, "train_shots": 1},
    **{"meta_batch": 4, "iterations": 150, "episodes": 200, "protocol": "independent"},
    **{"norm": "transductive", "engine": "batched", "device": "cpu", "status": "complete"},
    **{"metric": "accuracy", "mean": 0.666, "ci95": 0.017},
    **{"step_ms": 1186.6, "step_ms_iqr": 84.4, "eval_ms_per_episode": 6.03},
    **{"eval_ms_per_episode_iqr": 0.456, "peak_memory_bytes": 118 * 2**20},
}


def rows(*own: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame([ROW | one for one in own])


def lines(table: Table | None, width: int) -> list[str]:
    assert table is not None
    printed = io.StringIO()
    Console(file=printed, width=width).print(table)
    return [" ".join(line.split()) for line in printed.getvalue().splitlines()]


def unlike() -> pd.DataFrame:
    return rows(
        {"algorithm": "maml", "inner_steps": 1, "eval_steps": 3},
        {"algorithm": "reptile", "train_shots": 10, "inner_steps": 5, "eval_steps": 5},
    )


def test_the_table_shows_what_is_unlike_in_80_columns() -> None:
    found = lines(summary_table(unlike(), width=80), 80)
    assert "maml glyphs 5w1s 1 1 3 66.6 ± 1.7% 1187 (84) 6.03 (0.46) 118" in found
    assert "reptile glyphs 5w1s 10 5 5 66.6 ± 1.7% 1187 (84) 6.03 (0.46) 118" in found
    assert "algorithm episodes of shots steps steps score ms ms MiB" in found


def test_costs_that_do_not_fit_are_left_out_and_named() -> None:
    found = lines(summary_table(unlike(), width=75), 75)
    assert "maml glyphs 5w1s 1 1 3 66.6 ± 1.7% 1187 (84) 6.03 (0.46)" in found
    assert "too narrow for peak MiB: summary.csv has them" in found
    found = lines(summary_table(unlike(), width=55), 55)
    assert "maml glyphs 5w1s 1 1 3 66.6 ± 1.7%" in found
    assert "too narrow for meta-step ms, episode ms, peak MiB:" in found


def test_a_setting_that_some_lack_is_a_whole_number_where_it_is_one() -> None:
    summary = rows({"algorithm": "maml", "inner_steps": 1}, {"algorithm": "protonet"})
    found = lines(summary_table(summary), 120)
    assert "maml glyphs 5w1s 1 66.6 ± 1.7% 1187 (84) 6.03 (0.46) 118" in found
    assert "protonet glyphs 5w1s 66.6 ± 1.7% 1187 (84) 6.03 (0.46) 118" in found


def test_costs_that_were_not_measured_have_no_columns() -> None:
    summary = unlike().assign(step_ms=math.nan, eval_ms_per_episode=math.nan)
    found = lines(summary_table(summary), 120)
    assert "algorithm episodes of shots steps steps score MiB" in found
    bare = lines(summary_table(summary.assign(peak_memory_bytes=math.nan)), 120)
    assert "algorithm episodes of shots steps steps score" in bare
    assert not any("median" in line for line in bare)


def test_an_error_says_which_it_is() -> None:
    summary = rows({"algorithm": "maml", "metric": "mse", "mean": 0.587, "ci95": 0.069})
    assert any("mse 0.587 ± 0.069" in line for line in lines(summary_table(summary), 120))


def test_means_over_seeds_have_the_interval_of_seeds() -> None:
    """t(0.975) with 1 degree of freedom is 12.7062, and 0.02 / 2 is the mean's standard error."""
    summary = rows(
        {"algorithm": "maml", "seed": 0, "mean": 0.60, "inner_lr": 0.1},
        {"algorithm": "maml", "seed": 1, "mean": 0.62, "inner_lr": 0.1},
        {"algorithm": "maml", "seed": 0, "mean": 0.40, "inner_lr": 0.2},
        {"algorithm": "maml", "seed": 1, "status": "diverged", "mean": None, "inner_lr": 0.2},
    )
    found = lines(seeds_table(summary, ["inner_lr"]), 120)
    assert "maml glyphs 5w1s 0.1 2 61.0 ± 12.7%" in found
    assert "maml glyphs 5w1s 0.2 1 40.0%" in found


def test_test_samples_that_are_used_again_are_said() -> None:
    base = {"algorithm": "maml"}
    assert reuse_notes(rows(base | {"sample_reuse": 1.0})) == []
    (note,) = reuse_notes(rows(base | {"sample_reuse": 1.0}, base | {"sample_reuse": 1.2}))
    assert "200 episodes use each of glyphs's test samples 1.2 times" in note


def test_one_seed_has_no_mean_over_seeds() -> None:
    assert seeds_table(unlike()) is None
