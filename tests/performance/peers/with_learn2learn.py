"""learn2learn's MAML: its ``clone`` and ``maml_update`` over a module, one task after another.

Its ``adapt`` would also adapt batch normalisation's shifts, which are meta-learned alone here; it
calls ``maml_update`` like this.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn

from tests.performance.peers.autograd_loop import loss_of
from tests.performance.peers.work import Work

# MAML needs neither its data loaders, whose C sources do not build on Python 3.11, nor its
# environments and pictures, which want gym and torchvision.
for part in ("data", "gym", "text", "vision"):
    sys.modules[f"learn2learn.{part}"] = ModuleType(f"learn2learn.{part}")

from learn2learn.algorithms.maml import MAML, maml_update  # noqa: E402


def prepare(work: Work) -> Callable[[], dict[str, Tensor]]:
    """The meta-step of some work."""
    setting = work.setting
    maml = MAML(network(work), lr=setting.lr)
    tasks = list(zip(*map(torch.from_numpy, work.batch), strict=True))
    second_order = setting.kind == "maml"
    adapts = [name in work.adapted for name in work.weights]

    def step(learner: MAML, inputs: Tensor, targets: Tensor) -> None:
        loss = loss_of(learner(inputs), targets)
        parameters = list(learner.module.parameters())
        adapted = [p for p, so in zip(parameters, adapts, strict=True) if so]
        found = iter(torch.autograd.grad(loss, adapted, create_graph=second_order))
        maml_update(learner.module, setting.lr, [next(found) if so else None for so in adapts])

    def meta_gradient() -> dict[str, Tensor]:
        maml.zero_grad()
        for x_support, y_support, x_query, y_query in tasks:
            learner = maml.clone()
            for _ in range(setting.steps):
                step(learner, x_support, y_support)
            (loss_of(learner(x_query), y_query) / len(tasks)).backward()
        return {n: p.grad for n, p in zip(work.weights, maml.parameters(), strict=True)}

    def evaluation() -> dict[str, Tensor]:
        losses = []
        for x_support, y_support, x_query, y_query in tasks:
            learner = maml.clone()
            for done in range(setting.steps + 1):
                if done:
                    step(learner, x_support, y_support)
                with torch.no_grad():
                    losses.append(loss_of(learner(x_query), y_query))
        return {"loss": torch.stack(losses).view(len(tasks), -1)}

    return evaluation if setting.kind == "evaluation" else meta_gradient


def network(work: Work) -> nn.Module:
    """The model as a module, with the work's weights; its parameters are in the work's order."""
    weights = [torch.from_numpy(value) for value in work.weights.values()]
    layers: list[nn.Module] = []
    pooled = work.setting.model == "conv4_pool"
    for value in weights[:-2]:
        if value.dim() == 4:
            out, into = value.shape[:2]
            stride = 1 if pooled else 2
            norm = nn.BatchNorm2d(out, track_running_stats=False)
            norm.register_parameter("weight", None)
            layers += [nn.Conv2d(into, out, 3, stride, 1, bias=False), norm, nn.ReLU()]
            layers += [nn.MaxPool2d(2)] * pooled
        elif value.dim() == 2:
            layers += [nn.Linear(*reversed(value.shape)), nn.ReLU()]
    made = nn.Sequential(*layers, nn.Flatten(), nn.Linear(*reversed(weights[-2].shape)))
    made.to(weights[0].dtype)
    with torch.no_grad():
        for parameter, value in zip(made.parameters(), weights, strict=True):
            parameter.copy_(value)
    return made
