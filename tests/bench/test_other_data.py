"""The same name for other pictures: never taken for what was trained or tested before."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import datasets
from bench import making
from bench.comparison import compare
from bench.errors import BenchError
from bench.regression import check
from bench.runner import check_data
from bench.store import TRAINED, TRAINING, Record, Run
from tests.bench.test_comparison import cell_of, put, scores_of
from tests.bench.test_regression import BASE

RUN = (
    *("run", "--algos", "nearest", "--datasets", "image_folder", "--devices", "cpu"),
    *("--ways", "2", "--test-shots", "1", "--iterations", "4", "--meta-batch", "2"),
    *("--set", "val_episodes=4", "--episodes", "10", "--out", "r", "--data-root"),
)


def pictures(root: Path, seed: int) -> str:
    """A folder of random pictures: two classes of three in each split."""
    random = np.random.default_rng(seed)
    for split in ("train", "val", "test"):
        for name in ("a", "b"):
            folder = root / "image_folder" / split / f"{split} {name}"
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(3):
                pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return str(root)


def files(run: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(run.rglob("*"))}


def test_a_run_does_not_pass_off_the_scores_of_other_pictures(bench: Callable, tmp_path) -> None:
    root = pictures(tmp_path / "data", 0)
    assert bench(*RUN, root)[0] == 0
    (record,) = Run(tmp_path / "r").records()
    assert {"train_data", "test_data"} <= record.figures.keys()
    before = files(tmp_path / "r")
    # One picture of the test split is another one.
    other = tmp_path / "data" / "image_folder" / "test" / "test b" / "2.png"
    Image.new("RGB", (8, 8), "#123").save(other)
    for more in ([], ["--shots", "2"], ["--accept-changed-code"]):
        status, _, err = bench(*RUN, root, *more)
        assert status == 2
        assert err.count("\n") == 1
        assert "r holds cells made from other data than image_folder's of now (nearest" in err
    assert files(tmp_path / "r") == before
    # The pictures of then are taken for what they are, wherever they lie, and so is their absence.
    for place in (pictures(tmp_path / "elsewhere", 0), str(tmp_path / "nowhere")):
        status, out, _ = bench(*RUN, place)
        assert status == 0
        assert "1 of 1 cells are done already" in out


def test_what_was_trained_on_other_pictures_is_not_gone_on_from(
    bench: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, other = (pictures(tmp_path / name, seed) for seed, name in enumerate(("one", "other")))
    with monkeypatch.context() as stop:  # trained, but not tested
        stop.setattr(making, "evaluate", lambda *args, **kwargs: 1 / 0)
        assert bench(*RUN, root)[0] == 1
    (left,) = (tmp_path / "r" / "cells").iterdir()
    seconds = pd.read_parquet(left / TRAINING)["seconds"].tolist()
    with monkeypatch.context() as stop:  # tested, but not measured
        stop.setattr("bench.runner._measure", lambda cells, work: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bench(*RUN, root, "--retry-failed")
    assert pd.read_parquet(left / TRAINING)["seconds"].tolist() == seconds  # gone on from
    assert (left / TRAINED).exists()
    assert bench(*RUN, other, "--retry-failed")[0] == 0
    (record,) = Run(tmp_path / "r").records()
    assert bench(*RUN, other, "--out", "fresh")[0] == 0
    (fresh,) = Run(tmp_path / "fresh").records()
    for name in ("mean", "train_data", "test_data"):
        assert record.figures[name] == fresh.figures[name]


def test_other_test_data_is_not_paired_and_other_training_data_is_named(tmp_path: Path) -> None:
    one = {"train_data": "t", "test_data": "a"}
    put(tmp_path / "old", cell_of("maml"), scores_of(0.6), data=one)
    put(tmp_path / "new", cell_of("maml"), scores_of(0.6), data=one | {"test_data": "b"})
    with pytest.raises(BenchError, match="were tested on other data of the same name"):
        compare([tmp_path / "old", tmp_path / "new"])
    with pytest.raises(BenchError, match=r"no cell of .* has a counterpart .* of the same data"):
        check(tmp_path / "new", tmp_path / "old")
    put(tmp_path / "more", cell_of("maml"), scores_of(0.7), data=one | {"train_data": "u"})
    (row,) = compare([tmp_path / "old", tmp_path / "more"]).rows
    assert (row.algorithm_a, row.algorithm_b) == ("maml (train_data t)", "maml (train_data u)")
    assert row.unlike == "train_data t / u"
    (changed,) = [n for n in check(tmp_path / "more", tmp_path / "old").notes if "changed" in n]
    assert changed.endswith("settings changed: train_data t -> u")


def test_a_baseline_of_before_data_were_noted_still_serves(tmp_path: Path) -> None:
    put(tmp_path / "old", cell_of("maml"), BASE)
    put(tmp_path / "new", cell_of("maml"), BASE, data={"train_data": "t", "test_data": "a"})
    found = check(tmp_path / "new", tmp_path / "old")
    assert [finding.verdict for finding in found.findings] == ["ok"]
    assert not [note for note in found.notes if "alone" in note or "changed" in note]


def test_what_a_crash_left_of_other_pictures_does_not_become_a_result(
    bench: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, other = (pictures(tmp_path / name, seed) for seed, name in enumerate(("one", "other")))
    with monkeypatch.context() as crash:
        crash.setattr(Run, "_publish", lambda run, cell: None)
        assert bench(*RUN, root)[0] == 0
    assert Run(tmp_path / "r").records() == []
    assert bench(*RUN, other)[0] == 0
    (record,) = Run(tmp_path / "r").records()
    assert bench(*RUN, other, "--out", "fresh")[0] == 0
    (fresh,) = Run(tmp_path / "fresh").records()
    assert record.figures["test_data"] == fresh.figures["test_data"]
    assert record.figures["mean"] == fresh.figures["mean"]


def test_data_that_cannot_be_read_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(self, split: str) -> None:
        asked.append(self.download)
        raise PermissionError(split)

    monkeypatch.setattr(datasets.get("image_folder"), "load", load)
    sources = making.Sources(None, download=True)
    cells = [cell_of("maml", datasets=["image_folder"], seeds=[seed]) for seed in range(3)]
    records = [Record(cell, "s", {"test_data": "a"}) for cell in cells]
    check_data(records, cells, sources, Path("r"))
    assert asked == [False]
    assert sources.download


def test_a_search_is_of_the_pictures_that_it_began_with(bench: Callable, tmp_path: Path) -> None:
    search = (
        *("search", "--space", "inner_lr=0.1:1", "--trials", "1", "--algos", "maml"),
        *("--datasets", "image_folder", "--ways", "2", "--devices", "cpu", "--out", "s"),
        *("--set", "test_shots=1", "--set", "iterations=2"),
        *("--set", "val_episodes=4", "--data-root"),
    )
    root = pictures(tmp_path / "data", 0)
    assert bench(*search, root)[0] == 0
    pictures(tmp_path / "data", 1)
    status, _, err = bench(*search, root)
    assert status == 2
    assert "s holds another search" in err
