"""Evaluation: the same episodes for all, whatever the batches."""

from pathlib import Path

import pandas as pd
import pytest
import torch

import datasets
from bench import checkpoints, protocol
from bench.protocol import Kept, after_last_step, evaluate
from bench.sweep import Cell
from bench.training import build


def scores(cell: Cell, episodes: int = 30, steps: int = 2):
    source = datasets.get("tiny")().load("test")
    spec = datasets.EpisodeSpec("tiny", "test", 5, 1, 5, 0)
    return evaluate(build(cell, source), source, spec, episodes, steps)


def test_one_row_an_episode_and_step(cell: Cell) -> None:
    found = scores(cell)
    assert list(found.columns) == ["episode", "step", "loss", "metric"]
    assert found.groupby("episode")["step"].apply(list).tolist() == [[0, 1, 2]] * 30
    assert found["metric"].between(0, 1).all()


def test_scores_do_not_depend_on_how_many_episodes_are_asked_for(cell: Cell) -> None:
    few, many = scores(cell, 7), scores(cell, 30)
    assert (few["metric"].to_numpy() == many["metric"].to_numpy()[: len(few)]).all()


def test_batches_bound_memory_and_change_no_score(cell: Cell, monkeypatch) -> None:
    whole = scores(cell)
    monkeypatch.setattr(protocol, "BATCH", 4)
    assert (scores(cell)["metric"].to_numpy() == whole["metric"].to_numpy()).all()


def test_after_last_step_takes_one_metric_an_episode(cell: Cell) -> None:
    found = scores(cell)
    last = after_last_step(found)
    assert len(last) == 30
    assert last.iloc[3] == found.query("episode == 3 and step == 2")["metric"].item()


def test_an_untrained_constant_network_is_at_chance(cell: Cell) -> None:
    source = datasets.get("tiny")().load("test")
    algorithm = build(cell, source)
    with torch.no_grad():
        for parameter in algorithm.parameters():
            parameter.zero_()
    spec = datasets.EpisodeSpec("tiny", "test", 5, 1, 5, 0)
    found = evaluate(algorithm, source, spec, 50, 0)
    assert abs(found["metric"].mean() - 0.2) < 1e-6


def test_an_interrupted_evaluation_goes_on_from_the_scores_it_has(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "BATCH", 4)
    source = datasets.get("tiny")().load("test")
    spec = datasets.EpisodeSpec("tiny", "test", 5, 1, 5, 0)
    path, told = tmp_path / "scored", list[int]()

    def scored(stop_at: int, **notes: str) -> pd.DataFrame:
        told.clear()
        kept = Kept(path, notes, lambda: told[-1] >= stop_at)
        return evaluate(build(cell, source), source, spec, 30, 2, told.append, kept=kept)

    with pytest.raises(KeyboardInterrupt):
        scored(8, of="one")
    assert told == [4, 8]
    with pytest.raises(KeyboardInterrupt):
        scored(20, of="one")
    assert told == [12, 16, 20]
    before = path.read_bytes()
    assert scored(99, of="one").equals(scores(cell))
    assert told == [24, 28, 30]
    assert scored(99, of="another").equals(scores(cell))
    assert told[0] == 4
    path.write_bytes(before[:-1])
    assert scored(99, of="one").equals(scores(cell))
    assert told[0] == 4


def test_scores_are_kept_now_and_then(cell: Cell, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoints, "SECONDS", -1.0)
    monkeypatch.setattr(protocol, "BATCH", 4)
    source = datasets.get("tiny")().load("test")
    spec = datasets.EpisodeSpec("tiny", "test", 5, 1, 5, 0)
    kept = Kept(tmp_path / "scored", {}, lambda: False)

    def die(done: int) -> None:
        if done == 12:
            raise SystemExit

    with pytest.raises(SystemExit):
        evaluate(build(cell, source), source, spec, 30, 2, die, kept=kept)
    (found,) = kept.read()
    assert found.metric.shape == (8, 3)
