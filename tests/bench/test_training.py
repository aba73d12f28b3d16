"""Meta-training: the same bits whenever it is run, and however often it is interrupted."""

from pathlib import Path

import pandas as pd
import pytest
import torch

import datasets
from algorithms import Algorithm
from algorithms.base import Batch, Scores
from bench.checkpoints import read_tensors
from bench.errors import CellError, DivergedError
from bench.sweep import Cell
from bench.training import Iteration, build, meta_lr, train
from tests.accelerator import DEVICE, accelerator


@pytest.fixture
def splits() -> list[datasets.Source]:
    return [datasets.get("tiny")().load(split) for split in ("train", "val")]


def weights(algorithm) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in algorithm.parameters()])


def test_the_classes_to_pre_train_on_are_the_training_splits(cell: Cell, splits) -> None:
    for asked, found in ((None, splits[0].class_count()), (40, 40)):
        own = {"train_classes": asked}
        baseline = build(
            cell.model_copy(update={"algorithm": "finetune", "hyperparameters": own}), splits[0]
        )
        assert len(baseline.beside["classifier.weight"]) == found


def interrupted_after(*iterations: int):
    """A question that is answered by yes once at each of these iterations."""
    seen = {"now": 0}

    def ask() -> bool:
        seen["now"] += 1
        return seen["now"] in iterations

    return ask


def test_the_same_cell_twice_gives_the_same_bits(cell: Cell, splits, tmp_path: Path) -> None:
    first, log = train(cell, *splits, tmp_path / "a")
    again, log_again = train(cell, *splits, tmp_path / "b")
    assert torch.equal(weights(first), weights(again))
    assert log.loss == log_again.loss
    assert log.val_metric == log_again.val_metric


@pytest.mark.parametrize("name", ["maml", "reptile", "meta_sgd", "maml_pp", "finetune"])
def test_an_interrupted_training_goes_on_to_the_same_bits(
    name: str, cell: Cell, splits, tmp_path: Path
) -> None:
    own = {"inner_batch": 3, "inner_steps": 2, "inner_optimizer": "adam", "inner_lr": 0.01}
    if name != "reptile":  # which draws mini-batches of its own
        own = {"train_classes": None} if name == "finetune" else {}
    update = {"algorithm": name, "hyperparameters": cell.hyperparameters | own}
    cell = cell.model_copy(update=update)
    undisturbed, log = train(cell, *splits, tmp_path / "undisturbed")
    for stop in (7, 1, 12):
        with pytest.raises(KeyboardInterrupt):
            train(cell, *splits, tmp_path / "state", interrupted=interrupted_after(stop))
    resumed, log_resumed = train(cell, *splits, tmp_path / "state")
    assert torch.equal(weights(undisturbed), weights(resumed))
    assert log.loss == log_resumed.loss
    assert log.val_metric == log_resumed.val_metric
    assert log.val_iteration == log_resumed.val_iteration == [5, 10, 15, 20, 25, 30]


def test_a_training_on_an_accelerator_is_that_on_the_cpu_and_each_goes_on_from_the_other(
    cell: Cell, splits, tmp_path: Path
) -> None:
    cell = cell.model_copy(update={"iterations": 8})  # before rounding has grown to be seen
    expected, log = train(cell, *splits, None)
    with accelerator():
        moved = cell.model_copy(update={"device": DEVICE})
        moved_splits = [split.to(DEVICE) for split in splits]
        with pytest.raises(KeyboardInterrupt):
            train(moved, *moved_splits, tmp_path / "c", interrupted=interrupted_after(3))
        with pytest.raises(KeyboardInterrupt):
            train(cell, *splits, tmp_path / "c", interrupted=interrupted_after(2))
        trained, log_there = train(moved, *moved_splits, tmp_path / "c")
        found = [parameter.detach().cpu() for parameter in trained.parameters()]
    assert log_there.loss == pytest.approx(log.loss, rel=1e-4)
    assert log_there.val_metric == pytest.approx(log.val_metric, abs=0.01)
    for parameter, other in zip(expected.parameters(), found, strict=True):
        assert torch.allclose(parameter, other, rtol=1e-3, atol=1e-5)


def test_a_checkpoint_that_cannot_be_read_counts_as_none(
    cell: Cell, splits, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        train(cell, *splits, state, interrupted=interrupted_after(7))
    state.write_bytes(state.read_bytes()[:200])
    resumed, _ = train(cell, *splits, state)
    assert torch.equal(weights(resumed), weights(train(cell, *splits, tmp_path / "other")[0]))


def test_a_checkpoint_of_other_code_is_not_gone_on_from(cell: Cell, splits, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(cell, *splits, tmp_path / "s", source="old", interrupted=interrupted_after(7))
    seen: list[int] = []
    train(cell, *splits, tmp_path / "s", source="new", report=lambda p: seen.append(p.iteration))
    assert seen[0] == 1


def test_a_checkpoint_of_other_data_is_not_gone_on_from(cell: Cell, splits, tmp_path: Path) -> None:
    state = tmp_path / "s"
    with pytest.raises(KeyboardInterrupt):
        train(cell, *splits, state, data={"train_data": "a"}, interrupted=interrupted_after(7))
    seen: list[int] = []
    train(cell, *splits, state, data={"train_data": "b"}, report=lambda p: seen.append(p.iteration))
    assert seen[0] == 1


def test_validation_picks_the_parameters_that_are_kept(cell: Cell, splits, tmp_path: Path) -> None:
    # An outer step so large that the network gets worse: the best are not the last.
    wild = cell.model_copy(update={"meta_lr": 3.0})
    algorithm, log = train(wild, *splits, tmp_path / "state")
    state = read_tensors(tmp_path / "state", cell=wild.id, source="")
    kept = {n.removeprefix("best/"): v for n, v in state.items() if n.startswith("best/")}
    assert all(torch.equal(v, kept[n]) for n, v in algorithm.model.state_dict().items())
    last = {n.removeprefix("model/"): v for n, v in state.items() if n.startswith("model/")}
    best_was_last = log.val_metric[-1] == max(log.val_metric)
    assert best_was_last == all(torch.equal(kept[n], last[n]) for n in kept)


def test_what_is_learned_beside_the_model_is_kept_with_it(
    cell: Cell, splits, tmp_path: Path
) -> None:
    wild = cell.model_copy(update={"algorithm": "meta_sgd", "meta_lr": 3.0})
    algorithm, _ = train(wild, *splits, tmp_path / "state")
    state = read_tensors(tmp_path / "state", cell=wild.id, source="")
    kept = {n.removeprefix("best/"): v for n, v in state.items() if n.startswith("best/")}
    assert kept.keys() == algorithm.state_dict().keys()
    assert sum(name.startswith("meta_sgd/alpha.") for name in kept) == len(algorithm.beside) > 0
    assert all(torch.equal(v, kept[n]) for n, v in algorithm.state_dict().items())
    assert not all(torch.equal(v, state[f"model/{n}"]) for n, v in kept.items())


def test_without_a_validation_split_the_last_parameters_are_kept(
    cell: Cell, splits, tmp_path: Path
) -> None:
    algorithm, log = train(cell, splits[0], None, tmp_path / "state")
    state = read_tensors(tmp_path / "state", cell=cell.id, source="")
    assert log.val_metric == []
    for name, value in algorithm.model.state_dict().items():
        assert torch.equal(value, state[f"model/{name}"])


def test_training_lowers_the_loss(cell: Cell, splits, tmp_path: Path) -> None:
    longer = cell.model_copy(update={"iterations": 80, "val_every": 80})
    _, log = train(longer, *splits, tmp_path / "state")
    assert sum(log.loss[-10:]) < 0.8 * sum(log.loss[:10])


def test_a_loss_that_is_no_number_ends_the_cell_and_names_the_iteration(
    cell: Cell, splits, tmp_path: Path
) -> None:
    broken = cell.model_copy(update={"algorithm": "diverging"})
    with pytest.raises(DivergedError, match="diverged: the loss is nan at iteration 1") as raised:
        train(broken, *splits, tmp_path / "state")
    assert raised.value.iteration == 1


def test_a_validation_that_is_no_number_counts_as_divergence(
    cell: Cell, splits, tmp_path: Path, monkeypatch
) -> None:
    def fail(*_, **__):
        raise CellError("the loss is not finite")

    monkeypatch.setattr("bench.training.evaluate", fail)
    with pytest.raises(DivergedError, match="the loss is not finite, at iteration 5"):
        train(cell, *splits, tmp_path / "state")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", (1.0, 1.0, 1.0)),
        ("linear", (1.0, 0.5, 0.1)),
        ("cosine", (1.0, 0.5, 0.0245)),
    ],
)
def test_schedules_of_the_outer_step(cell: Cell, schedule: str, expected: tuple) -> None:
    scheduled = cell.model_copy(
        update={"meta_schedule": schedule, "meta_lr": 1.0, "iterations": 10}
    )
    found = [meta_lr(scheduled, i) for i in (0, 5, 9)]
    assert found == pytest.approx(expected, abs=1e-3)


def test_initialisation_does_not_depend_on_the_algorithm(cell: Cell, splits) -> None:
    from bench.training import build

    other = cell.model_copy(update={"algorithm": "fomaml"})
    seeded = cell.model_copy(update={"seed": 1})
    start = weights(build(cell, splits[0]))
    assert torch.equal(start, weights(build(other, splits[0])))
    assert not torch.equal(start, weights(build(seeded, splits[0])))


def test_what_an_algorithm_draws_beside_its_model_is_a_function_of_the_seed(
    cell: Cell, splits
) -> None:
    state = torch.get_rng_state()
    first, again, other = (
        build(
            cell.model_copy(update={"algorithm": "cavia", "hyperparameters": {}, "seed": seed}),
            splits[0],
        ).beside["film.weight"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


class Watched:
    """What an algorithm is told and draws in each meta-step; its meta-gradient is ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.progress: list[float] = []
        self.noise: list[float] = []
        self.task_seeds: list[int] = []
        self.inputs: list[torch.Tensor] = []
        watched = self

        def meta_backward(self: Algorithm, batch: Batch) -> Scores:
            watched.progress.append(self.progress)
            watched.noise.append(float(torch.rand(())))
            watched.task_seeds += self.task_seeds or []
            watched.inputs.append(batch["train"][0])
            for parameter in self.parameters():
                parameter.grad = torch.ones_like(parameter)
            return Scores(torch.zeros(2), torch.zeros(2))

        monkeypatch.setattr(Algorithm, "meta_backward", meta_backward)


def test_the_outer_step_follows_its_schedule_and_its_bound(
    cell: Cell, splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    Watched(monkeypatch)
    outer = {"meta_optimizer": "sgd", "meta_lr": 0.1, "meta_schedule": "linear", "meta_clip": 0.5}
    cell = cell.model_copy(update=outer)
    before = weights(build(cell, splits[0]))
    algorithm, _ = train(cell, splits[0], None, None)
    # 0.5 a step, times 0.1, falling to nothing: 1, 29/30, ..., 1/30 of it.
    assert torch.allclose(before - weights(algorithm), torch.tensor(0.5 * 0.1 * 31 / 2), atol=1e-4)


def test_an_algorithm_is_told_the_share_that_is_done(
    cell: Cell, splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    train(cell, splits[0], None, None)
    assert watched.progress == [iteration / 30 for iteration in range(30)]


def test_each_meta_step_has_noise_and_each_task_mini_batches_of_its_own(
    cell: Cell, splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = cell.hyperparameters | {"inner_batch": 1}
    runs = []
    for seed in (0, 0, 1):
        with monkeypatch.context() as patched:
            watched = Watched(patched)
            train(cell.model_copy(update={"hyperparameters": own, "seed": seed}), *splits, None)
            runs.append(watched)
    first, again, other = runs
    assert len(set(first.noise)) == 30
    assert len(set(first.task_seeds)) == 30 * 2
    assert (first.noise, first.task_seeds) == (again.noise, again.task_seeds)
    assert not set(first.noise) & set(other.noise)
    assert not set(first.task_seeds) & set(other.task_seeds)


def test_training_episodes_are_those_of_the_seed(
    cell: Cell, splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    met = []
    for update in ({}, {"algorithm": "fomaml"}, {"seed": 1}):
        with monkeypatch.context() as patched:
            watched = Watched(patched)
            train(cell.model_copy(update=update), splits[0], None, None)
            met.append(torch.stack(watched.inputs))
    assert torch.equal(met[0], met[1])
    assert not torch.equal(met[0], met[2])


@pytest.mark.parametrize(("dataset", "best"), [("tiny", 1), ("sinusoid", 2)])
def test_the_highest_accuracy_is_kept_and_the_lowest_error(
    cell: Cell, dataset: str, best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    Watched(monkeypatch)
    values = iter([0.5, 0.9, 0.1, 0.3, 0.4, 0.5])
    monkeypatch.setattr(
        "bench.training.evaluate",
        lambda *_, **__: pd.DataFrame(
            {"episode": [0], "step": [2], "loss": [1.0], "metric": [next(values)]}
        ),
    )
    outer = {"meta_optimizer": "sgd", "meta_lr": 0.01, "dataset": dataset}
    if dataset == "sinusoid":
        outer |= {"model": "mlp"}
    cell = cell.model_copy(update=outer)
    splits = [datasets.get(dataset)().load(split) for split in ("train", "val")]
    before = weights(build(cell, splits[0]))
    algorithm, log = train(cell, *splits, None)
    assert len(log.val_metric) == 6
    # Every iteration takes 0.01 from each parameter, and every fifth is validated.
    taken = torch.tensor(0.01 * 5 * (best + 1))
    assert torch.allclose(before - weights(algorithm), taken, atol=1e-4)


def test_what_was_done_before_an_interruption_is_told_again(
    cell: Cell, splits, tmp_path: Path
) -> None:
    told: list[Iteration] = []
    with pytest.raises(KeyboardInterrupt):
        train(cell, *splits, tmp_path / "s", interrupted=interrupted_after(12))
    _, log = train(cell, *splits, tmp_path / "s", report=told.append)
    assert [each.iteration for each in told] == [5, 10, 12, *range(13, 31)]
    validated = [(each.iteration, each.validation) for each in told if each.validation is not None]
    assert validated == list(zip(log.val_iteration, log.val_metric, strict=True))
    assert sum(each.seconds for each in told) == pytest.approx(sum(log.seconds))
