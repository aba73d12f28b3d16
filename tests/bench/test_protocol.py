"""Evaluation: the same episodes for all, whatever the batches."""

import torch

import datasets
from bench import protocol
from bench.protocol import after_last_step, evaluate
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
