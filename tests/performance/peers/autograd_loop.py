"""The plain autograd loop: one task after another, ``torch.autograd.grad`` for each inner step.

What learn2learn does, without its classes, and the network in plain functions: the fastest form of
it that we know. :func:`meta_step` takes the inner update as an argument, for TorchOpt's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.performance.peers.work import Work

Parameters = dict[str, Tensor]
Update = Callable[[Parameters, Parameters], Parameters]
"""From the parameters that adapt and their gradients to the parameters after the step."""


def prepare(work: Work) -> Callable[[], dict[str, Tensor]]:
    """The meta-step of some work."""
    lr = work.setting.lr

    def descend(before: Parameters, gradients: Parameters) -> Parameters:
        return {name: value - lr * gradients[name] for name, value in before.items()}

    return meta_step(work, lambda _: descend)


def meta_step(work: Work, start: Callable[[Parameters], Update]) -> Callable[[], dict[str, Tensor]]:
    """The meta-step of some work, whose inner updates ``start`` gives for each task anew."""
    setting = work.setting
    theta = {n: torch.from_numpy(w).clone().requires_grad_() for n, w in work.weights.items()}
    tasks = list(zip(*map(torch.from_numpy, work.batch), strict=True))
    second_order = setting.kind == "maml"

    def trajectory(inputs: Tensor, targets: Tensor, begin: Parameters) -> Iterator[Parameters]:
        fast = begin
        update = start({name: fast[name] for name in work.adapted})
        yield fast
        for _ in range(setting.steps):
            before = {name: fast[name] for name in work.adapted}
            found = torch.autograd.grad(
                loss_of(outputs(fast, inputs), targets),
                list(before.values()),
                create_graph=second_order,
            )
            fast = fast | update(before, dict(zip(before, found, strict=True)))
            yield fast

    def meta_gradient() -> dict[str, Tensor]:
        for value in theta.values():
            value.grad = None
        for x_support, y_support, x_query, y_query in tasks:
            *_, fast = trajectory(x_support, y_support, theta)
            (loss_of(outputs(fast, x_query), y_query) / len(tasks)).backward()
        return {name: value.grad for name, value in theta.items()}

    def evaluation() -> dict[str, Tensor]:
        losses = []
        leaves = {name: value.detach().requires_grad_() for name, value in theta.items()}
        for x_support, y_support, x_query, y_query in tasks:
            for fast in trajectory(x_support, y_support, leaves):
                with torch.no_grad():
                    losses.append(loss_of(outputs(fast, x_query), y_query))
        return {"loss": torch.stack(losses).view(len(tasks), -1)}

    return evaluation if setting.kind == "evaluation" else meta_gradient


def outputs(p: Parameters, x: Tensor) -> Tensor:
    """The network on samples ``(n, *shape)``: which one, its parameters tell."""
    if x.dim() == 2:
        for layer in ("body.1", "body.3"):
            x = F.relu(F.linear(x, p[f"{layer}.weight"], p[f"{layer}.bias"]))
    else:
        pooled = "body.4.weight" in p  # a block has a fourth layer then
        for block in range(4):
            first = block * (4 if pooled else 3)
            x = F.conv2d(x, p[f"body.{first}.weight"], None, 1 if pooled else 2, 1)
            x = F.relu(F.batch_norm(x, None, None, None, p[f"body.{first + 1}.bias"], True))
            if pooled:
                x = F.max_pool2d(x, 2)
    return F.linear(x.flatten(1), p["head.weight"], p["head.bias"])


def loss_of(found: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy for integer targets, mean squared error for others."""
    if targets.is_floating_point():
        return F.mse_loss(found, targets)
    return F.cross_entropy(found, targets)
