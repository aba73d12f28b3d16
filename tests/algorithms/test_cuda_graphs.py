"""What is recorded computes what Python would have, whatever changes between steps.

On the emulated accelerator, whose recordings are held to the terms of CUDA's: fixed memory, no
Python when they run, no waiting while they are made.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import algorithms
from algorithms import AlgorithmError
from algorithms.cuda_graphs import KEPT, _relative_error
from algorithms.maml import MAML
from algorithms.verification import verify
from tests.accelerator import DEVICE, accelerator
from tests.algorithms import derivation
from tests.algorithms.test_accelerator import agree, made, step

RECORDABLE = [name for name in algorithms.names() if name not in ("maml_pp", "protonet", "nearest")]


def batches(count: int, **shape: int) -> list[dict[str, Any]]:
    drawn = [derivation.make_batch(seed=seed, **shape) for seed in range(count)]
    return [batch | {"classes": tuple(y for _, y in batch.values())} for batch in drawn]


def trained(algorithm: algorithms.Algorithm, on: list[dict[str, Any]]) -> list[Tensor]:
    """All that comes of some meta-steps, each followed by an evaluation."""
    optimizer = torch.optim.Adam([{"params": algorithm.parameters()}], lr=0.01)
    found = []
    for index, batch in enumerate(on):
        algorithm.progress = index / len(on)
        found += step(algorithm, batch)
        optimizer.step()
    return found


@pytest.mark.parametrize(
    ("name", "engine"), [*((name, "batched") for name in RECORDABLE), ("maml", "higher")]
)
def test_a_training_from_recordings_is_the_one_without(name: str, engine: str) -> None:
    settings = {"keep_moments": False} if name == "reptile" else {}
    with accelerator():
        expected = trained(made(name, engine, DEVICE, **settings), batches(2))
        recorded = made(name, engine, DEVICE, cuda_graphs=True, **settings)
        assert agree(expected, trained(recorded, batches(2)))
        assert len(recorded.recordings.kept) == 2  # of meta-steps and of evaluations


@pytest.mark.parametrize(
    "settings",
    [
        {"inner_optimizer": "adam"},
        {"inner_batch": 4, "eval_batch": 4},
        {"tasks_per_pass": 2},
        {"norm": "single"},
        {"norm": "support"},
    ],
    ids=str,
)
def test_whatever_the_inner_loop_does(settings: dict[str, Any]) -> None:
    with accelerator():
        expected = trained(made("maml", "batched", DEVICE, **settings), batches(2))
        recorded = made("maml", "batched", DEVICE, cuda_graphs=True, **settings)
        assert agree(expected, trained(recorded, batches(2)))


def test_python_computes_nothing_of_what_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = batches(2)
    with accelerator() as log:
        plain, recorded = (
            made("maml", "batched", DEVICE, cuda_graphs=each) for each in (False, True)
        )
        counts = {}
        for algorithm in (plain, recorded):
            algorithm.meta_backward(first)
            log.launched.clear()
            algorithm.meta_backward(second)
            counts[algorithm] = len(log.launched)
        monkeypatch.setattr(recorded, "meta_gradient", None)
        recorded.meta_backward(second)
    # The copies of its batch, the means over tasks and the scores are left.
    assert counts[recorded] < counts[plain] / 5


@pytest.mark.parametrize("change", ["shape", "number", "memory"])
def test_what_no_recording_is_of_is_recorded_anew(change: str) -> None:
    first, second = batches(2)
    if change == "shape":
        (second,) = batches(1, tasks=2)
    with accelerator():
        found = []
        for graphs in (False, True):
            maml = made("maml", "batched", DEVICE, cuda_graphs=graphs)
            step(maml, first)
            if change == "number":
                maml.inner_lr = 0.01
            if change == "memory":
                for parameter in maml.parameters():
                    parameter.held = parameter.held * 2  # as by parameter.data
            found.append(step(maml, second))
        assert agree(*found)


def test_few_recordings_are_kept() -> None:
    (batch,) = batches(1)
    with accelerator():
        maml = made("maml", "batched", DEVICE, cuda_graphs=True)
        maml.meta_backward(batch)
        for steps in range(KEPT + 1):
            maml.evaluate(batch, steps)
            maml.meta_backward(batch)
            assert len(maml.recordings.kept) <= KEPT


class Noisy(derivation.Net):
    """With noise, and with an average that its forward moves."""

    level: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.level.lerp_(x.detach().mean(), 0.1)
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


def test_noise_is_drawn_as_ever_and_a_recording_leaves_no_trace() -> None:
    with accelerator():
        found = []
        for graphs in (False, True):
            torch.manual_seed(1)
            noisy = Noisy().double().to(DEVICE)
            maml = algorithms.create("maml", noisy, cuda_graphs=graphs)
            torch.manual_seed(2)
            losses = [maml.meta_backward(batch).loss.cpu() for batch in batches(1) * 3]
            found.append([*losses, noisy.level.cpu()])
    assert agree(*found)
    assert not torch.equal(losses[1], losses[2])


def test_what_is_no_number_is_so_in_both() -> None:
    nan, one, two = (torch.full((2,), value) for value in (torch.nan, 1.0, 2.0))
    assert _relative_error([one, [two, None]], [one, [two, None]]) == 0
    assert _relative_error([one, [one, nan]], [one, [two, nan]]) == 0.5
    assert _relative_error([one, [one, nan]], [one, [one, two]]) == torch.inf
    assert _relative_error([one, [one, two]], [one, [nan, two]]) == torch.inf


class Annealing(MAML):
    """Python decides anew in each step, by what no one is told of."""

    name = "annealing"

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.steps: list[int] = []

    def meta_gradient(self, tasks: algorithms.Tasks) -> Any:
        self.steps.append(1)
        outputs, gradients = super().meta_gradient(tasks)
        return outputs, [gradient / len(self.steps) for gradient in gradients]


def test_a_recording_that_comes_to_something_else_is_refused() -> None:
    (batch,) = batches(1)
    with accelerator():
        annealing = Annealing(derivation.Net().double().to(DEVICE), cuda_graphs=True)
        with pytest.raises(AlgorithmError, match=r"annealing cannot be recorded: .* other results"):
            annealing.meta_backward(batch)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("maml_pp", {}, "maml_pp changes with the progress of training"),
        ("reptile", {"inner_optimizer": "adam"}, "does not go with what reptile carries over"),
        ("maml", {"checkpoint_inner": True}, "does not go with checkpoint_inner"),
        ("maml", {"norm": "running"}, "does not go with norm 'running'"),
    ],
)
def test_what_cannot_be_recorded_is_refused(
    name: str, settings: dict[str, Any], message: str
) -> None:
    (batch,) = batches(1)
    with accelerator(), pytest.raises(AlgorithmError, match=f"^cuda_graphs.*{message}"):
        made(name, "batched", DEVICE, cuda_graphs=True, **settings).meta_backward(batch)


class Asking(MAML):
    """Waits for a value in the middle of a step."""

    name = "asking"

    def meta_gradient(self, tasks: algorithms.Tasks) -> Any:
        outputs, gradients = super().meta_gradient(tasks)
        return outputs, [g if float(g.sum()) > 0 else -g for g in gradients]


def test_a_step_that_waits_cannot_be_recorded() -> None:
    (batch,) = batches(1)
    with accelerator():
        asking = Asking(derivation.Net().double().to(DEVICE), cuda_graphs=True)
        with pytest.raises(AlgorithmError, match="asking cannot be recorded: operation not perm"):
            asking.meta_backward(batch)


def test_a_gradient_is_verified_unrecorded() -> None:
    (batch,) = batches(1)
    assert verify("maml", derivation.Net(), batch, {"cuda_graphs": True}) < 1e-12


def test_there_are_none_on_a_cpu() -> None:
    (batch,) = batches(1)
    with pytest.raises(AlgorithmError, match="cuda_graphs is for NVIDIA GPUs, not for cpu"):
        made("maml", "batched", "cpu", cuda_graphs=True).meta_backward(batch)
