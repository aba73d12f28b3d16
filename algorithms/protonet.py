"""Prototypical networks: Snell, Swersky and Zemel 2017, Prototypical Networks for Few-shot Learning
(arXiv 1703.05175)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algorithms.base import Algorithm, AlgorithmError, head_names, head_of, register, replaced
from algorithms.inner_loop import Tasks
from algorithms.losses import task_losses


@register("protonet")
class ProtoNet(Algorithm):
    """Classify by the distance of features to class means; nothing adapts.

    With f_phi the model without its head, the prototype c_k is the mean of f_phi over the support
    samples of class k (equation 1), and log p(y = k | x) is -||f_phi(x) - c_k||^2 up to a constant
    (equation 2). The meta-gradient is grad_phi of the query sets' mean cross-entropy. The head is
    not used and not learned. Scores are the same after every number of inner steps.
    """

    summary = "distance to class means of learned features (Snell et al. 2017)"
    defaults = {"*": {"eval_steps": 0}}

    def __init__(
        self, model: nn.Module, *, norm: str = "transductive", engine: str = "auto"
    ) -> None:
        super().__init__(model, norm=norm, engine=engine)
        self.inner_steps = 0

    def made_network(self) -> nn.Module:
        if len(head_names(self.model)) == len(list(self.model.parameters())):
            raise AlgorithmError(
                "protonet learns what is before the head; the model has nothing there"
            )
        return replaced(self.model, head_of(self.model), nn.Identity())

    def adapted(self) -> list[str]:
        return []

    def meta_gradient(self, tasks: Tasks) -> tuple[Tensor, Sequence[Tensor | None]]:
        outputs = self.similarities(tasks, create_graph=True)
        losses = task_losses(outputs, tasks.query_targets)
        return outputs, torch.autograd.grad(losses.sum(), self.parameters(), allow_unused=True)

    def predictions(self, tasks: Tasks, steps: int) -> Iterator[Tensor]:
        with torch.no_grad():
            outputs = self.similarities(tasks, create_graph=False)
        for _ in range(steps + 1):
            yield outputs

    def similarities(self, tasks: Tasks, *, create_graph: bool) -> Tensor:
        """-||f(x) - c_k||^2 of every query sample and class, ``(tasks, m, ways)``."""
        # First, for it asks how many classes there are: a GPU that has nothing to do yet answers at
        # once.
        members = class_members(tasks.support_targets)
        theta = self.inner_loop.initial(len(tasks), create_graph=create_graph)
        support = self.inner_loop.forward(theta, tasks.support_inputs)
        query = self.inner_loop.query(theta, tasks)
        return -squared_distances(query, class_means(support, members))


def class_members(targets: Tensor) -> Tensor:
    """Which class each sample is of: int64 ``(tasks, n, ways)``, 1 for its own.

    Args:
        targets: int64 ``(tasks, n)``, 0 .. ways - 1, each at least once in every task.

    Raises:
        AlgorithmError: targets that are no classes.
    """
    if targets.is_floating_point():
        raise AlgorithmError("class means need targets that are classes, not numbers")
    return F.one_hot(targets)


def class_means(features: Tensor, members: Tensor) -> Tensor:
    """Mean features of each class: ``(tasks, ways, d)``.

    Args:
        features: ``(tasks, n, ...)``, flattened to d numbers a sample.
        members: of :func:`class_members`.
    """
    members = members.to(features)
    means = members.transpose(1, 2) @ features.flatten(2)
    return means / members.sum(1).unsqueeze(2)


def squared_distances(features: Tensor, means: Tensor) -> Tensor:
    """Of each sample ``(tasks, m, ...)`` to each class mean ``(tasks, ways, d)``."""
    return (features.flatten(2).unsqueeze(2) - means.unsqueeze(1)).square().sum(3)
