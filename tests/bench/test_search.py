"""A search proposes, prunes and resumes by validation alone."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest

import datasets
from bench.store import Run
from bench.sweep import tomllib
from tests.bench.conftest import TINY

FIXED = (
    *("--algos", "maml", "--datasets", "tiny", "--devices", "cpu", "--plugin", str(TINY)),
    *("--set", "model=fc", "--set", "iterations=8", "--set", "meta_batch=2"),
    *("--set", "val_episodes=20", "--set", "val_every=2"),
)
SPACE = "inner_lr=0.001:10:log,inner_steps=1:3,norm=support|single"


@pytest.fixture
def no_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the test split fails."""
    tiny = datasets.get("tiny")
    load = tiny.load

    def guarded(self, split: str):
        assert split != "test"
        return load(self, split)

    monkeypatch.setattr(tiny, "load", guarded)


@pytest.mark.usefixtures("no_test_split")
def test_a_search_counts_its_budget_prunes_and_goes_on_as_if_never_cut(
    bench, tmp_path: Path
) -> None:
    status, _, err = bench("search", *FIXED, "--space", SPACE, "--trials", "12", "--out", "s")
    assert (status, err) == (0, "")
    table = pd.read_parquet(tmp_path / "s" / "trials.parquet")
    assert len(table) == len(pd.read_csv(tmp_path / "s" / "trials.csv")) == 12
    assert table["inner_lr"].between(0.001, 10).all()
    assert set(table["inner_steps"]) <= {1, 2, 3}
    assert set(table["norm"]) <= {"support", "single"}
    assert table["inner_lr"].nunique() == 12
    pruned = table[table["state"] == "pruned"]
    assert len(pruned) > 0
    assert (pruned["iterations"] < 8).all()
    assert (pruned["trial"] >= 5).all()
    complete = table[table["state"] == "complete"]
    assert (complete["iterations"] == 8).all()
    assert (table["samples"] == table["iterations"] * 2 * 5 * (1 + 5)).all()
    assert (table["val_episodes"] == 20 * (table["iterations"] // 2)).all()

    # Cut after seven trials and gone on with, it makes the same proposals.
    for number in range(7, 12):
        (tmp_path / "s" / "trials" / f"maml-{number:04}.json").unlink()
    assert bench("search", *FIXED, "--space", SPACE, "--trials", "12", "--out", "s")[0] == 0
    again = pd.read_parquet(tmp_path / "s" / "trials.parquet")
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), table.drop(columns="seconds"))

    best = complete.loc[complete["value"].idxmax()]
    text = (tmp_path / "s" / "best-maml.toml").read_text()
    assert tomllib.loads(text)["set"]["inner_lr"] == [best["inner_lr"]]
    assert f"Trial {best['trial']}, the best of 12" in text
    assert f"{table['iterations'].sum()} iterations" in text

    status, _, err = bench("search", *FIXED, "--space", "inner_lr=1:2", "--out", "s")
    assert (status, err) == (2, "bench: s holds another search; give another --out\n")


@pytest.mark.parametrize(
    "edit",
    [
        {"value": "high"},
        {"value": float("nan")},
        {"validations": {"2": None}},
        {"parameters": {"inner_lr": 99.0}},
        {"parameters": {"outer_lr": 0.1}},
        {"trial": 7},
        {"algorithm": "fomaml"},
        {"more": 1},
    ],
    ids=str,
)
def test_a_record_that_is_none_of_this_search_is_made_again(
    bench, tmp_path: Path, edit: dict
) -> None:
    asked = ("search", *FIXED, "--space", "inner_lr=0.01:0.1", "--trials", "2", "--out", "s")
    assert bench(*asked)[0] == 0
    record = tmp_path / "s" / "trials" / "maml-0000.json"
    whole = json.loads(record.read_text())
    record.write_text(json.dumps(whole | edit))
    assert bench(*asked)[0] == 0
    again = json.loads(record.read_text())
    assert again | {"seconds": 0} == whole | {"seconds": 0}


def test_the_best_trial_is_said(bench) -> None:
    asked = ("--space", "inner_lr=0.01:0.1", "--trials", "2", "--out", "s")
    _, out, _ = bench("search", *FIXED, *asked)
    table = pd.read_csv("s/trials.csv")
    best = table.loc[table["value"].idxmax()]
    assert f"best:  maml trial {best['trial']}: complete {best['value']:.4f}" in out


def test_a_run_takes_the_best_settings(bench, tmp_path: Path) -> None:
    assert (
        bench("search", *FIXED, "--space", "inner_lr=0.1:1", "--trials", "1", "--out", "s")[0] == 0
    )
    config = ("--config", "s/best-maml.toml", "--plugin", str(TINY), "--episodes", "20")
    assert bench("run", *config, "--out", "r")[0] == 0
    (record,) = Run(tmp_path / "r").records()
    (found,) = pd.read_parquet(tmp_path / "s" / "trials.parquet")["inner_lr"]
    assert record.cell.hyperparameters["inner_lr"] == found
    # The same cell, trained as the trial was.
    training = pd.read_parquet(tmp_path / "r" / "cells" / record.cell.id / "training.parquet")
    (value,) = pd.read_parquet(tmp_path / "s" / "trials.parquet")["value"]
    assert training["val_metric"].max() == value


def test_what_diverges_is_noted_and_leaves_no_best(bench, tmp_path: Path) -> None:
    arguments = ("--space", "inner_lr=0.1:1", "--trials", "2", "--out", "s")
    status, out, _ = bench("search", *FIXED, "--algos", "diverging", *arguments)
    assert status == 1
    assert "diverging trial 1: diverged after 1 iterations" in out
    assert not list((tmp_path / "s").glob("best*"))


def test_of_errors_the_lowest_is_the_best_and_gradients_are_counted(bench, tmp_path: Path) -> None:
    fixed = (
        "--algos",
        "maml",
        "--datasets",
        "sinusoid",
        "--devices",
        "cpu",
        "--set",
        "val_every=2",
    )
    fixed += ("--set", "iterations=4", "--set", "meta_batch=3", "--set", "val_episodes=20")
    asked = ("--space", "inner_lr=0.0001:0.01:log,inner_steps=1:2", "--trials", "4", "--out", "s")
    assert bench("search", *fixed, *asked)[0] == 0
    table = pd.read_parquet(tmp_path / "s" / "trials.parquet")
    assert table["value"].nunique() == 4
    best = table.loc[table["value"].idxmin()]
    written = tomllib.loads((tmp_path / "s" / "best-maml.toml").read_text())
    assert written["set"]["inner_lr"] == [best["inner_lr"]]
    # Each task's inner steps, and its outer one.
    taken = table["iterations"] * 3 * (table["inner_steps"] + 1)
    assert (table["gradients"] == taken).all()
    for trial in table["trial"]:
        record = json.loads((tmp_path / f"s/trials/maml-{trial:04}.json").read_text())
        assert record["value"] == min(record["validations"].values())


@pytest.mark.parametrize(
    ("algorithm", "reason"),
    [("raising", "KeyError: 'no such key'"), ("greedy", "RuntimeError: "), ("leaving", "SystemEx")],
)
def test_a_trial_that_goes_wrong_is_noted_with_its_reason_and_the_others_go_on(
    bench, tmp_path: Path, algorithm: str, reason: str
) -> None:
    arguments = ("--space", "inner_lr=0.1:1", "--trials", "2", "--out", "s")
    status, out, err = bench("search", *FIXED, "--algos", f"{algorithm},maml", *arguments)
    assert (status, err) == (1, "")
    table = pd.read_parquet(tmp_path / "s" / "trials.parquet")
    assert list(table["state"]) == ["failed", "failed", "complete", "complete"]
    assert all(text.startswith(reason) for text in table["reason"][:2])
    assert f"{algorithm} trial 1: failed after" in out
    assert [path.name for path in (tmp_path / "s").glob("best*")] == ["best-maml.toml"]


def test_a_trial_that_is_interrupted_goes_on_from_its_checkpoint(
    bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("search", *FIXED, "--space", SPACE, "--trials", "2")
    assert bench(*arguments, "--out", "whole")[0] == 0
    steps = 0

    @contextmanager
    def after_13_steps() -> Iterator[Callable[[], bool]]:
        def interrupted() -> bool:
            nonlocal steps
            steps += 1
            return steps == 13

        yield interrupted

    monkeypatch.setattr("bench.search.interruptible", after_13_steps)
    assert bench(*arguments, "--out", "cut")[0] == 130
    assert [path.name for path in (tmp_path / "cut/trials").glob("*.state")] == ["maml-0001.state"]
    assert bench(*arguments, "--out", "cut")[0] == 0
    assert steps == 16  # of two trials of eight: none was taken twice
    assert not list((tmp_path / "cut/trials").glob("*.state"))
    whole, cut = (pd.read_parquet(tmp_path / name / "trials.parquet") for name in ("whole", "cut"))
    pd.testing.assert_frame_equal(cut.drop(columns="seconds"), whole.drop(columns="seconds"))
    assert (cut["seconds"] > 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--space", "iner_lr=0.1:1"), "no setting 'iner_lr' of maml; did you mean 'inner_lr'?"),
        (("--space", "inner_lr=1:0.1"), "'inner_lr=1:0.1' is not NAME=LOW:HIGH"),
        (("--space", "inner_lr=0:1:log"), "'inner_lr=0:1:log' is not NAME=LOW:HIGH"),
        (("--space", "inner_steps=0:3"), "inner_steps is 0; it must be positive"),
        (("--space", "inner_steps=1:2.5"), "inner-steps: input should be a valid integer"),
        (("--space", "norm=support|layer"), "norm is 'layer'; it must be one of"),
        (("--space", "iterations=4:8"), "iterations is given twice"),
        (("--space", "inner_lr=1:2,inner_lr=1:3"), "inner_lr is given twice"),
        (("--space", "eval_seed=0:9"), "eval_seed is what trials are judged by"),
        (("--space", "inner_lr=0.1:1", "--shots", "1,2"), "this has 2 cells"),
        (("--space", "precision=tf32|float32"), "precision tf32 is for NVIDIA GPUs"),
        (("--space", "inner_lr=0.1:1", "--trials", "0"), "Invalid value for '--trials'"),
    ],
)
def test_what_cannot_be_searched_is_one_line(
    bench, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    status, _, err = bench("search", *FIXED, *arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
