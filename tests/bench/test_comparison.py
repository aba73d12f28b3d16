"""The comparison pairs what may be paired, knows known answers, and says them in sentences."""

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from bench import comparison, measure
from bench.comparison import COLUMNS, compare
from bench.errors import BenchError
from bench.protocol import after_last_step
from bench.store import CHECKPOINT, PERFORMANCE, SCORES, TRAINING, Run
from bench.sweep import Cell, Sweep
from tests.bench.conftest import QUICK

CONTRACT = [
    *("algorithm_a", "algorithm_b", "dataset", "ways", "shots", "metric", "difference", "low"),
    *("high", "p", "p_holm", "effect", "seeds", "episodes"),
]
NOISE = np.random.default_rng(0)


def cell_of(algorithm: str = "maml", **settings) -> Cell:
    settings = {"datasets": ["glyphs"], "devices": ["cpu"], "episodes": 100} | settings
    (only,) = Sweep(algos=[algorithm], **settings).cells()
    return only


def costs(step: float = 0.1, peak: float = 1e8, session: str = "s") -> pd.DataFrame:
    """Seven repeats that drift, and meta-steps that take `step` of the calibration's time."""
    drift = 1 + 0.1 * np.arange(7)
    rows = [
        (phase, repeat, share * drift[repeat], share * drift[repeat], peak, session)
        for repeat in range(7)
        for phase, share in (
            (measure.STEP, step),
            (measure.EVALUATION, 2 * step),
            (measure.CALIBRATION, 1.0),
        )
    ]
    columns = ["phase", "repeat", "seconds", "process_seconds", "peak_bytes", "session"]
    return pd.DataFrame(rows, columns=columns)


def put(
    folder: Path, cell: Cell, scores, performance=None, source="s", metric="accuracy", data=None
) -> None:
    """Write a complete cell with these scores, as a run writes it."""
    run = Run(folder)
    run.cells.mkdir(parents=True, exist_ok=True)
    workplace = run.workplace(cell)
    start = pd.DataFrame({"episode": range(len(scores)), "step": 0, "loss": 1.0, "metric": 0.5})
    steps = [start.assign(step=step) for step in range(cell.eval_steps)]
    end = start.assign(step=cell.eval_steps, metric=scores)
    pd.concat([*steps, end]).to_parquet(workplace / SCORES)
    (workplace / TRAINING).write_text("some")
    (workplace / CHECKPOINT).write_text("some")
    if performance is not None:
        performance.to_parquet(workplace / PERFORMANCE)
    address = cell.test_spec.address
    figures = {"metric": metric, "mean": float(np.mean(scores)), "episode_address": address}
    figures |= {"engine": "batched"} | (data or {})
    run.complete(cell, source, figures)


def scores_of(mean: float, count: int = 100, spread: float = 0.1) -> np.ndarray:
    return mean + spread * NOISE.standard_normal(count)


def test_a_planted_difference_is_found_with_its_interval_and_costs(tmp_path: Path) -> None:
    base = scores_of(0.6)
    gain = 0.02 + 0.03 * NOISE.standard_normal(100)
    put(tmp_path, cell_of("maml"), base + gain, costs(0.2, 3e8))
    put(tmp_path, cell_of("fomaml"), base, costs(0.1, 1e8))
    found = compare([tmp_path])
    (row,) = found.rows
    assert (row.algorithm_a, row.algorithm_b) == ("fomaml", "maml")
    expected = stats.ttest_rel(base, base + gain)
    low, high = expected.confidence_interval(0.95)
    assert (row.difference, row.low, row.high) == pytest.approx((-gain.mean(), low, high))
    assert row.p == row.p_holm == pytest.approx(expected.pvalue)
    assert (row.better, row.over, row.seeds, row.episodes) == ("maml", "episodes", 1, 100)
    assert (row.time_ratio, row.time_low, row.time_high) == pytest.approx((0.5, 0.5, 0.5))
    assert row.memory_ratio == pytest.approx(1 / 3)
    points = [100 * value for value in (gain.mean(), -high, -low)]
    assert row.sentence().startswith(
        "maml over fomaml on glyphs 5-way 1-shot: "
        f"{points[0]:+.1f} points [{points[1]:.1f}, {points[2]:.1f}] over 100 episodes, p < 0.0001 "
        "after Holm, 2.00x the time [2.00, 2.00], 3.00x the memory"
    )


def test_no_difference_says_what_could_have_been_found(tmp_path: Path) -> None:
    base = scores_of(0.6)
    difference = 0.1 * NOISE.standard_normal(100)
    put(tmp_path, cell_of("maml"), base + difference - difference.mean())
    put(tmp_path, cell_of("anil"), base)
    (row,) = compare([tmp_path]).rows
    assert row.better == ""
    # A t test at 5% finds a difference of this size four times in five.
    error, detectable = difference.std(ddof=1) / 10, row.resolvable
    found = stats.nct.sf(stats.t.ppf(0.975, 99), 99, detectable / error)
    assert found == pytest.approx(0.8, abs=1e-4)
    assert row.enough_for_half == pytest.approx(400, rel=0.03)
    assert (
        f"no difference shown: 100 episodes can resolve {100 * detectable:.2g} points; "
        f"{row.enough_for_half:.0f} would resolve {50 * detectable:.2g}"
    ) in row.sentence()
    assert "costs not measured in turns" in row.sentence()


def test_a_lower_error_is_better(tmp_path: Path) -> None:
    base = scores_of(1.0)
    put(tmp_path, cell_of("maml", datasets=["sinusoid"]), base - 0.1, metric="mse")
    put(tmp_path, cell_of("anil", datasets=["sinusoid"]), base, metric="mse")
    (row,) = compare([tmp_path]).rows
    assert row.difference == pytest.approx(0.1)
    assert row.better == "maml"
    assert "maml over anil on sinusoid 1-shot: -0.1 mse (lower is better)" in row.sentence()


def test_p_values_are_corrected_over_the_whole_table(tmp_path: Path) -> None:
    base = scores_of(0.6)
    for algorithm in ("maml", "fomaml", "anil"):
        put(tmp_path, cell_of(algorithm), base + scores_of(0.02, spread=0.05))
    table = compare([tmp_path]).table
    assert list(table.columns)[: len(CONTRACT)] == CONTRACT
    smallest = table["p"].min()
    assert table.loc[table["p"].idxmin(), "p_holm"] == pytest.approx(min(3 * smallest, 1))
    assert table["p_holm"].ge(table["p"]).all()
    for test in ("p_wilcoxon", "p_permutation"):
        assert table[f"{test}_holm"].min() == pytest.approx(min(3 * table[test].min(), 1))


def test_two_seeds_give_an_interval_over_seeds(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        base = scores_of(0.6)
        put(tmp_path, cell_of("maml", seeds=[seed]), base + 0.1 + 0.01 * seed)
        put(tmp_path, cell_of("anil", seeds=[seed]), base)
    put(tmp_path, cell_of("anil", seeds=[7]), base)  # a seed that only one has
    (row,) = compare([tmp_path]).rows
    assert (row.over, row.seeds) == ("seeds", 3)
    assert row.difference == pytest.approx(-0.11)
    # The differences are the same in every episode, so that seeds are all that varies.
    half = stats.t.ppf(0.975, 2) * 0.01 / 3**0.5
    assert (row.low, row.high) == pytest.approx((-0.11 - half, -0.11 + half))
    assert "over 3 seeds" in row.sentence()


def test_what_seeds_can_resolve_allows_for_the_episodes_they_share(tmp_path: Path) -> None:
    """Where the episodes are all that varies, more seeds resolve no more."""
    base, other = scores_of(0.6), scores_of(0.6)
    for seed in (0, 1, 2):
        put(tmp_path, cell_of("maml", seeds=[seed]), base)
        put(tmp_path, cell_of("anil", seeds=[seed]), other)
    (row,) = compare([tmp_path]).rows
    assert row.resolvable > row.high - row.difference
    assert row.enough_for_half == np.inf
    assert "on 100 episodes, and without more of them not half of it" in row.sentence()


def test_cells_that_met_other_episodes_are_never_paired(tmp_path: Path) -> None:
    put(tmp_path, cell_of("maml"), scores_of(0.6))
    put(tmp_path, cell_of("anil", eval_seed=1), scores_of(0.6))
    with pytest.raises(BenchError, match=r"nothing to compare: left out: .* other test episodes"):
        compare([tmp_path])
    put(tmp_path, cell_of("fomaml"), scores_of(0.6))
    put(tmp_path, cell_of("reptile", episodes=50), scores_of(0.6, 50))
    found = compare([tmp_path])
    assert [(row.algorithm_a, row.algorithm_b) for row in found.rows] == [("fomaml", "maml")]
    assert len([note for note in found.left_out if "100 of glyphs/test" in note]) == 3
    assert any("anil and maml" in note and "seed=1" in note for note in found.left_out)


@pytest.mark.parametrize(("spread", "doubtful"), [(0.07, True), (0.1, False)])
def test_scores_that_vary_less_than_coin_tosses_are_doubted(
    tmp_path: Path, spread: float, doubtful: bool
) -> None:
    """25 fair answers an episode of which 60% are right scatter by 0.098."""
    noise = (NOISE.permutation(100) - 49.5) / 29.01
    for name in ("maml", "anil"):
        put(tmp_path, cell_of(name, test_shots=5), 0.6 + spread * noise)
    notes = [note for note in compare([tmp_path]).notes if note.startswith("doubtful")]
    assert len(notes) == 2 * doubtful


def test_costs_of_different_sessions_are_not_set_against_each_other(tmp_path: Path) -> None:
    put(tmp_path, cell_of("maml"), scores_of(0.6), costs(session="one"))
    put(tmp_path, cell_of("anil"), scores_of(0.6), costs(session="two"))
    (row,) = compare([tmp_path]).rows
    assert np.isnan([row.time_ratio, row.memory_ratio]).all()


def test_settings_that_are_unlike_are_named_and_tuned_ones_are_not(tmp_path: Path) -> None:
    put(tmp_path, cell_of("maml", norm="support", inner_lr=0.1), scores_of(0.6))
    put(tmp_path, cell_of("anil", eval_steps=7), scores_of(0.6))
    (row,) = compare([tmp_path]).rows
    assert "eval_steps 7 / 3" in row.unlike
    assert "norm transductive / support" in row.unlike
    assert "inner_lr" not in row.unlike
    assert "unlike (anil / maml): " in row.sentence()


def test_one_algorithm_set_up_in_two_ways_is_told_apart(tmp_path: Path) -> None:
    put(tmp_path / "a", cell_of("maml"), scores_of(0.6))
    put(tmp_path / "b", cell_of("maml", inner_lr=0.4), scores_of(0.6))
    put(tmp_path / "b", cell_of("maml"), scores_of(0.9))  # in both runs: the first is taken
    (row,) = compare([tmp_path / "a", tmp_path / "b"]).rows
    assert {row.algorithm_a, row.algorithm_b} == {"maml (inner_lr 0.1)", "maml (inner_lr 0.4)"}
    assert abs(row.difference) < 0.1


def test_what_was_swept_is_named_even_between_algorithms(tmp_path: Path) -> None:
    for inner_lr in (0.1, 0.4):
        put(tmp_path, cell_of("maml", inner_lr=inner_lr), scores_of(0.6))
    put(tmp_path, cell_of("fomaml", inner_lr=0.2), scores_of(0.6))
    unlike = {(row.algorithm_a, row.algorithm_b): row.unlike for row in compare([tmp_path]).rows}
    assert unlike == {
        ("fomaml", "maml (inner_lr 0.1)"): "inner_lr 0.2 / 0.1",
        ("fomaml", "maml (inner_lr 0.4)"): "inner_lr 0.2 / 0.4",
        ("maml (inner_lr 0.1)", "maml (inner_lr 0.4)"): "inner_lr 0.1 / 0.4",
    }


def test_cells_of_different_source_are_not_mixed_in_silence(tmp_path: Path) -> None:
    put(tmp_path, cell_of("maml"), scores_of(0.6), source="old")
    put(tmp_path, cell_of("anil"), scores_of(0.6), source="new")
    with pytest.raises(BenchError, match=r"different source code \(new, old\); --accept-changed"):
        compare([tmp_path])
    found = compare([tmp_path], accept_changed_code=True)
    assert "source new / old" in found.rows[0].unlike
    assert any("different source code" in note for note in found.notes)


def test_a_damaged_cell_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    for algorithm in ("maml", "anil", "fomaml"):
        put(tmp_path, cell_of(algorithm), scores_of(0.6))
    broken = cell_of("anil").id
    (tmp_path / "cells" / broken / SCORES).write_bytes(b"PAR1 is not enough")
    found = compare([tmp_path])
    assert len(found.rows) == 1
    assert any("damaged" in note and broken in note for note in found.notes)


def test_scores_that_do_not_vary_are_doubted(tmp_path: Path) -> None:
    put(tmp_path, cell_of("maml"), scores_of(0.6))
    put(tmp_path, cell_of("anil"), np.full(100, 0.2))
    assert [n for n in compare([tmp_path]).notes if n.startswith("doubtful: anil glyphs")]


def test_three_algorithms_over_two_settings_are_ranked(tmp_path: Path) -> None:
    for shots in (1, 5):
        for place, algorithm in enumerate(("maml", "anil", "reptile")):
            put(tmp_path, cell_of(algorithm, shots=[shots]), scores_of(0.8 - 0.2 * place))
    found = compare([tmp_path])
    assert found.ranks is not None
    means = dict(zip(found.ranks.names, found.ranks.ranking.mean_ranks, strict=True))
    assert means == {"maml": 1, "anil": 2, "reptile": 3}
    assert "maml 1.0, anil 2.0, reptile 3.0" in found.ranks.sentence()
    assert "exploratory" in found.ranks.sentence()
    written = found.write(tmp_path)
    assert [path.name for path in written] == [
        *("comparison.csv", "critical_difference.png", "critical_difference.svg")
    ]
    assert written[1].stat().st_size > 5_000


def test_two_algorithms_are_not_ranked(tmp_path: Path) -> None:
    for shots in (1, 5):
        for algorithm in ("maml", "anil"):
            put(tmp_path, cell_of(algorithm, shots=[shots]), scores_of(0.8))
    found = compare([tmp_path])
    assert (found.ranks, found.aggregate) == (None, None)


def test_ranks_name_the_settings_that_are_unlike(tmp_path: Path) -> None:
    for shots in (1, 5):
        for algorithm, steps in (("maml", 1), ("anil", 1), ("reptile", 5)):
            cell = cell_of(algorithm, shots=[shots], inner_steps=steps)
            put(tmp_path, cell, scores_of(0.8))
    found = compare([tmp_path])
    assert "inner_steps" in found.ranks.unlike
    assert "inner_steps" in found.ranks.sentence()
    assert "unlike: " in found.ranks.diagram().axes[0].get_title()


def test_seeds_and_settings_come_to_one_figure_an_algorithm(tmp_path: Path) -> None:
    """Every run of maml beats every one of anil in one setting, half of them in the other."""
    means = {
        ("maml", 1): (0.9, 0.8),
        ("anil", 1): (0.5, 0.6),
        ("maml", 5): (0.7, 0.9),
        ("anil", 5): (0.8, 0.8),
    }
    for (algorithm, shots), of_seeds in means.items():
        for seed, mean in enumerate(of_seeds):
            scores = np.where(np.arange(100) % 2, mean - 0.05, mean + 0.05)
            put(tmp_path, cell_of(algorithm, shots=[shots], seeds=[seed]), scores)
    comparison = compare([tmp_path])
    found = comparison.aggregate
    assert (found.settings, found.seeds, found.leader) == (2, 2, "maml")
    assert found.middle["maml"].estimate == pytest.approx((0.8 + 0.9) / 2)
    assert found.middle["anil"].estimate == pytest.approx((0.6 + 0.8) / 2)
    assert found.improvement["anil"].estimate == 0.75
    middle, better = found.sentences()
    assert "interquartile mean over 2 settings and 2 seeds" in middle
    assert "maml 85.0% [" in middle
    assert "other seeds" in middle
    assert "a run of maml beats one of another over 2 settings and 2 seeds (95% by a" in better
    assert "of so few seeds too narrow): anil 0.75 [" in better
    written = comparison.write(tmp_path)
    assert [path.name for path in written] == ["comparison.csv", "aggregate.csv"]
    assert pd.read_csv(written[1])["statistic"].tolist() == [
        *("interquartile_mean", "interquartile_mean", "probability_of_improvement")
    ]


def test_errors_are_not_averaged_over_settings(tmp_path: Path) -> None:
    for shots in (5, 10):
        for algorithm, error in (("maml", 1.0), ("anil", 2.0)):
            for seed in (0, 1):
                cell = cell_of(algorithm, datasets=["sinusoid"], shots=[shots], seeds=[seed])
                put(tmp_path, cell, scores_of(error), metric="mse")
    found = compare([tmp_path]).aggregate
    assert (found.middle, found.leader) == ({}, "maml")
    assert found.improvement["anil"].estimate == 1


def test_the_command_says_and_writes_what_a_real_run_shows(bench, tmp_path: Path) -> None:
    bench("run", "--algos", "maml,anil", *QUICK, "--out", "r")
    status, out, err = bench("compare", "r")
    assert (status, err) == (0, "")
    assert "maml" in out
    assert "after Holm" in out
    assert "x the time" in out
    table = pd.read_csv(tmp_path / "r" / "comparison.csv")
    assert tuple(table.columns) == COLUMNS
    scores = {
        record.cell.algorithm: after_last_step(Run(tmp_path / "r").scores(record.cell))
        for record in Run(tmp_path / "r").records()
    }
    difference = (scores["anil"] - scores["maml"]).mean()
    assert table["difference"].item() == pytest.approx(difference)
    assert table["time_ratio"].item() > 0


def test_runs_without_results_end_in_one_line(bench, tmp_path: Path) -> None:
    status, _, err = bench("compare", "nowhere")
    assert (status, err) == (2, "bench: there is no run in nowhere: it has no cells/\n")
    put(tmp_path / "r", cell_of("maml"), scores_of(0.6))
    status, _, err = bench("compare", "r")
    assert status == 2
    assert "nothing to compare: all cells are of maml" in err
    shutil.rmtree(tmp_path / "r" / "cells" / cell_of("maml").id)
    status, _, err = bench("compare", "r")
    assert (status, err) == (2, "bench: r has no complete cells\n")
    assert not (tmp_path / "r" / "comparison.csv").exists()


def test_what_is_said_of_all_settings_is_of_one_device(tmp_path: Path) -> None:
    for shots in (1, 5):
        for device, levels in (("cpu", (0.8, 0.6, 0.5)), ("cuda:0", (0.5, 0.6, 0.8))):
            for name, level in zip(("maml", "fomaml", "anil"), levels, strict=True):
                cell = cell_of(name, shots=[shots], devices=[device])
                put(tmp_path, cell, scores_of(level))
    found = compare([tmp_path])
    assert found.ranks is not None
    assert "mean ranks over 2 settings: maml 1.0, fomaml 2.0, anil 3.0" in found.ranks.sentence()
    assert "what is said of all settings is of the cells on cpu" in found.notes
    assert all((" on cpu" in line) != (" on cuda:0" in line) for line in found.lines()[1:7])


def test_ratios_keep_their_digits() -> None:
    said = [comparison._times(ratio) for ratio in (0.0294, 1.04, 12.34, 123.4, 1234.5)]
    assert said == ["0.029", "1.04", "12.3", "123", "1,234"]


def test_a_name_means_one_set_up_whatever_came_to_nothing_elsewhere(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for shots, lost in ((1, 0.8), (5, 0.1)):
        for algorithm in ("anil", "fomaml"):
            put(tmp_path, cell_of(algorithm, shots=[shots]), scores_of(0.6))
        for lr in (0.1, 0.8):
            cell = cell_of("maml", shots=[shots], set={"inner_lr": [lr]})
            if lr == lost:
                run.fail(cell, "the loss is nan", diverged_at=3)
            else:
                put(tmp_path, cell, scores_of(0.7))
    found = compare([tmp_path])
    named = {row.algorithm_b for row in found.rows if row.algorithm_b.startswith("maml")}
    assert named == {"maml (inner_lr 0.1)", "maml (inner_lr 0.8)"}
    assert found.ranks is None  # two algorithms alone met both settings
    (left_out,) = [note for note in found.notes if note.startswith("left out")]
    assert "maml glyphs 5-way 1-shot seed 0 (inner_lr 0.8) (diverged at iteration 3)" in left_out
    put(tmp_path, cell_of("reptile"), scores_of(0.5))
    for shots in (1, 5):
        put(tmp_path, cell_of("boil", shots=[shots]), scores_of(0.5))
    assert "; without maml (inner_lr 0.1), maml (inner_lr 0.8), reptile, not in all settings" in (
        compare([tmp_path]).ranks.sentence()
    )


def test_the_same_cell_with_other_scores_is_said(tmp_path: Path) -> None:
    for folder, level in (("a", 0.6), ("b", 0.7)):
        put(tmp_path / folder, cell_of("maml"), scores_of(level))
        put(tmp_path / folder, cell_of("anil"), np.full(100, 0.5))
    both = compare([tmp_path / "a", tmp_path / "b"])
    assert both.rows[0].difference == compare([tmp_path / "a"]).rows[0].difference
    (said,) = [note for note in both.notes if "again" in note]
    assert said.startswith("maml on glyphs 5-way 1-shot seed 0 is there again with other scores; ")


def test_small_differences_are_not_rounded_away(tmp_path: Path) -> None:
    noise = np.random.default_rng(5)
    base = 0.9 + 0.001 * noise.standard_normal(100)
    put(tmp_path, cell_of("maml"), base + 0.0004 + 0.0005 * noise.standard_normal(100))
    put(tmp_path, cell_of("anil"), base)
    said = compare([tmp_path]).rows[0].sentence()
    assert "maml over anil on glyphs 5-way 1-shot: +0.04 points [0.03" in said


def test_with_several_pairs_more_is_needed_to_tell_them_apart(tmp_path: Path) -> None:
    """What can be resolved allows for Holm: the least of three p values is taken three times."""
    base, noise = scores_of(0.6), 0.1 * NOISE.standard_normal(100)
    put(tmp_path / "two", cell_of("maml"), base + noise)
    put(tmp_path / "two", cell_of("anil"), base)
    (alone,) = compare([tmp_path / "two"]).rows
    shutil.copytree(tmp_path / "two", tmp_path / "three")
    put(tmp_path / "three", cell_of("boil"), base + 0.1 * NOISE.standard_normal(100))
    (among,) = (
        row
        for row in compare([tmp_path / "three"]).rows
        if {row.algorithm_a, row.algorithm_b} == {"maml", "anil"}
    )
    error = (noise).std(ddof=1) / 10
    found = stats.nct.sf(stats.t.ppf(1 - 0.05 / 6, 99), 99, among.resolvable / error)
    assert found == pytest.approx(0.8, abs=1e-4)
    assert among.resolvable > alone.resolvable


def test_a_p_below_5_percent_alone_makes_nobody_better_among_several(tmp_path: Path) -> None:
    base = scores_of(0.6)
    noise = NOISE.standard_normal(100)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    put(tmp_path, cell_of("maml"), base + 0.022 + 0.1 * noise)  # t = 2.2, p = 0.03
    put(tmp_path, cell_of("anil"), base)
    for name in ("boil", "fomaml"):
        put(tmp_path, cell_of(name), base + 0.1 * NOISE.standard_normal(100))
    (row,) = (
        row
        for row in compare([tmp_path]).rows
        if {row.algorithm_a, row.algorithm_b} == {"maml", "anil"}
    )
    assert 0.02 < row.p < 0.05 < row.p_holm
    assert row.better == ""


def test_the_better_ones_costs_stand_over_the_others(tmp_path: Path) -> None:
    base = scores_of(0.6)
    slow = costs(0.2, 3e8)
    slow["seconds"] *= 1 + 0.2 * np.random.default_rng(1).random(len(slow))
    put(tmp_path, cell_of("maml"), base + 0.05 + 0.01 * NOISE.standard_normal(100), slow)
    put(tmp_path, cell_of("anil"), base, costs(0.1, 1e8))
    (row,) = compare([tmp_path]).rows
    assert (row.algorithm_a, row.better) == ("anil", "maml")
    said = row.sentence()
    ratio = re.search(r"([\d.]+)x the time \[([\d.]+), ([\d.]+)\], ([\d.]+)x the memory", said)
    assert ratio is not None
    shown = [float(number) for number in ratio.groups()]
    assert shown[:3] == pytest.approx(
        [1 / row.time_ratio, 1 / row.time_high, 1 / row.time_low], abs=0.006
    )
    assert shown[1] < shown[0] < shown[2]
    assert shown[3] == pytest.approx(3)
