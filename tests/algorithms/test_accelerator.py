"""On an accelerator: the same numbers, and nothing that it would have to be waited for.

The accelerator is an emulated one (:mod:`tests.accelerator`): these say where tensors are and when
the CPU waits, on any machine. What takes a GPU is in ``tests/bench/test_gpu.py``.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop

import algorithms
from algorithms import models
from tests.accelerator import DEVICE, accelerator
from tests.algorithms import derivation

ENGINES = ("batched", "higher")
WAYS = 3


def batch_of(tasks: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
    batch = derivation.make_batch(tasks=tasks)
    return batch | {"classes": tuple(targets for _, targets in batch.values())}


def made(name: str, engine: str, device: str, **settings: Any) -> algorithms.Algorithm:
    torch.manual_seed(1)
    model = derivation.Net().double().to(device)
    known = algorithms.hyperparameters(algorithms.get(name))
    usual = {"inner_steps": 2, "train_classes": WAYS, "engine": engine}
    settings = {key: value for key, value in usual.items() if key in known} | settings
    with models.drawing(0):
        return algorithms.create(name, model, **settings)


def step(algorithm: algorithms.Algorithm, batch: Any) -> list[Tensor]:
    """Meta-gradient, and scores of the meta-step and of an evaluation, on the CPU."""
    torch.manual_seed(2)
    scores = algorithm.meta_backward(batch)
    evaluated = algorithm.evaluate(batch, 2)
    gradients = [parameter.grad for parameter in algorithm.parameters()]
    found = [*gradients, *vars(scores).values(), *vars(evaluated).values()]
    device = next(algorithm.model.parameters()).device
    assert all(value.device == device for value in found)
    return [value.detach().to("cpu") for value in found]


def agree(here: list[Tensor], there: list[Tensor]) -> bool:
    pairs = zip(here, there, strict=True)
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in pairs)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", algorithms.names())
def test_what_is_computed_on_an_accelerator_is_what_the_cpu_computes(
    name: str, engine: str
) -> None:
    here = step(made(name, engine, "cpu"), batch_of())
    with accelerator() as log:
        algorithm = made(name, engine, DEVICE)
        assert agree(here, step(algorithm, batch_of()))
        # And waits for no value: else the CPU, which launches kernels faster than they run, would
        # stand still with each.
        log.asked.clear()
        algorithm.meta_backward(batch_of())
    # Of class means, how many classes there are.
    passes = 1 if engine == "batched" else 2
    assert len(log.asked) == (passes if name in ("protonet", "nearest") else 0), log.asked


@pytest.mark.parametrize("norm", ["support", "single", "running"])
@pytest.mark.parametrize("engine", ENGINES)
def test_whatever_normalises(engine: str, norm: str) -> None:
    here = made("maml", engine, "cpu", norm=norm)
    expected = step(here, batch_of())
    with accelerator():
        there = made("maml", engine, DEVICE, norm=norm)
        assert agree(expected, step(there, batch_of()))
        averages = [value.to("cpu") for value in there.model.buffers()]
    assert agree(list(here.model.buffers()), averages)


@pytest.mark.parametrize(
    "settings",
    [
        {"inner_optimizer": "adam"},
        {"inner_batch": 4, "eval_batch": 4},
        {"inner_clip": 0.1},
        {"tasks_per_pass": 1},
        {"checkpoint_inner": True},
    ],
    ids=str,
)
def test_whatever_the_inner_loop_does(settings: dict[str, Any]) -> None:
    here = step(made("maml", "batched", "cpu", **settings), batch_of())
    # Checkpoints stop early by an exception, which a device that is written in Python does not
    # survive where gradients are taken within gradients.
    with accelerator(), set_checkpoint_early_stop(False):
        there = step(made("maml", "batched", DEVICE, **settings), batch_of())
    assert agree(here, there)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_meta_step_copies_its_batch_and_nothing_else(engine: str) -> None:
    with accelerator() as log:
        algorithm = made("maml", engine, DEVICE)
        algorithm.meta_backward(batch_of())
        log.copied = 0
        algorithm.meta_backward(batch_of())
    assert log.copied == 4


def test_more_tasks_at_once_take_no_more_launches() -> None:
    with accelerator() as log:
        maml = made("maml", "batched", DEVICE)
        counts = []
        for tasks in (2, 2, 8):
            log.launched.clear()
            maml.meta_backward(batch_of(tasks))
            counts.append(len(log.launched))
    assert counts[1] == counts[2]


def test_the_emulated_accelerator_notices_what_a_gpu_would() -> None:
    with accelerator() as log:
        there = torch.arange(3.0, device=DEVICE)
        with pytest.raises(RuntimeError, match="mixes tensors of accel:0 with such of the CPU"):
            there + torch.ones(3)
        assert log.asked == []
        assert float(there.sum()) == 3
        assert len(log.asked) == 1
        assert log.copied == 0
        assert torch.equal(there.cpu(), torch.arange(3.0))
        assert log.copied == 1
        assert len(log.asked) == 2
        there[there > 1]
        assert len(log.asked) == 3
