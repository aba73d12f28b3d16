"""This project's own engines, and the initial weights that every subject is handed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import algorithms
from algorithms import models
from tests.performance.peers.work import Setting, Work, episodes


def work_of(setting: Setting) -> Work:
    """A setting's arrays, in float32."""
    outputs = 1 if setting.regression else setting.ways
    model = models.build(setting.model, setting.shape, outputs, seed=0)
    weights = {name: value.detach().numpy() for name, value in model.named_parameters()}
    adapted = [name for name in weights if name not in model.outer_only]
    return Work(setting, weights, adapted, episodes(setting)).of("float32")


def prepare(work: Work, engine: str) -> Callable[[], dict[str, Tensor]]:
    """The meta-step of some work on an engine."""
    setting = work.setting
    weights = {name: torch.from_numpy(value).clone() for name, value in work.weights.items()}
    outputs = 1 if setting.regression else setting.ways
    model = models.build(setting.model, setting.shape, outputs, seed=0)
    model.to(next(iter(weights.values())).dtype).load_state_dict(weights, strict=False)
    name = "maml" if setting.kind == "evaluation" else setting.kind
    algorithm = algorithms.create(
        name, model, inner_lr=setting.lr, inner_steps=setting.steps, engine=engine
    )
    x_support, y_support, x_query, y_query = map(torch.from_numpy, work.batch)
    batch = {"train": (x_support, y_support), "test": (x_query, y_query)}

    def meta_gradient() -> dict[str, Tensor]:
        algorithm.meta_backward(batch)
        return {name: p.grad for name, p in algorithm.meta_parameters.items() if p.grad is not None}

    def evaluation() -> dict[str, Tensor]:
        return {"loss": algorithm.evaluate(batch).loss}

    return evaluation if setting.kind == "evaluation" else meta_gradient


def flops(work: Work) -> int:
    """Floating-point operations of the work on the reference engine, as torch counts them: matrix
    products and convolutions, forward and backward. Tasks are alike, so one is counted."""
    step = prepare(work.of("float32", tasks=1), "higher")
    step()  # the first also looks at the model
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops()) * work.setting.tasks
