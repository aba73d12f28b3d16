"""Baseline and Baseline++: Chen, Liu, Kira, Wang and Huang 2019, A Closer Look at Few-shot
Classification (arXiv 1904.04232)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algorithms.base import (
    Algorithm,
    AlgorithmError,
    Batch,
    Scores,
    head_names,
    head_of,
    register,
    replaced,
)
from algorithms.batched import LAYERS
from algorithms.batched_layers import TaskLinear
from algorithms.inner_loop import Fast, Tasks
from algorithms.losses import task_losses


@register("finetune")
class FineTune(Algorithm):
    """Baseline: pre-train on the training classes, then freeze the body and train a new head.

    Pre-training (section 3.2) is ordinary classification: the body f_theta and a classifier W_b of
    all training classes descend the mean cross-entropy of a batch's samples, support and query
    sets alike. Losses and accuracies of a meta-step are those of the query sets' samples among all
    training classes.

    A task is met with theta fixed and a new head W_n: the model's own, which is never learned, so
    that every task begins with the same random weights. The inner steps descend the mean
    cross-entropy of the support set in W_n alone.

    Batch normalisation takes its statistics from a task at a time, in pre-training too, as ``norm``
    says. The paper trains W_n for 100 epochs of mini-batches of 4 with momentum and weight decay
    (its code; ``eval_batch`` gives such mini-batches), here it takes ``eval_steps`` plain steps.

    Args:
        model: any module, as for :class:`algorithms.Algorithm`, whose head is linear.
        train_classes: how many classes there are to pre-train on; a harness that is not told takes
            those of its training split. ``meta_backward`` needs a batch with ``"classes"``, the
            classes of all samples as numbers below it: int64 ``(B, n)`` for the support sets,
            ``(B, m)`` for the query sets.
        settings: those of :class:`algorithms.Algorithm`.

    Raises:
        AlgorithmError: no classes to pre-train on, or a model without a linear head over a body.
    """

    without = frozenset({"inner_steps", "inner_batch"})
    summary = "pre-trains on all training classes, trains a new head (Baseline, Chen et al. 2019)"
    defaults = {"*": {"inner_lr": 0.3, "eval_steps": 20}}

    def __init__(
        self, model: nn.Module, *, train_classes: int | None = None, **settings: Any
    ) -> None:
        if train_classes is None:
            raise AlgorithmError(
                f"{self.name} needs train_classes, the number of classes to pre-train on; "
                "regression has none"
            )
        if not train_classes >= 1:
            raise AlgorithmError(f"train_classes is {train_classes}; it must be positive")
        self.train_classes = train_classes
        super().__init__(model, **settings)
        head = set(self.adapted())
        body = {name: value for name, value in self.meta_parameters.items() if name not in head}
        if not body:
            raise AlgorithmError(
                f"{self.name} learns what is before the head; the model has nothing there"
            )
        self.meta_parameters = body
        self.beside = self.classifier()

    def made_network(self) -> nn.Module:
        self.linear_head()
        return self.model

    def linear_head(self) -> nn.Linear:
        """The model's head."""
        head = head_of(self.model)
        if not isinstance(head, nn.Linear):
            raise AlgorithmError(f"{self.name} needs a model with a linear head")
        return head

    def adapted(self) -> list[str]:
        head = head_names(self.network)
        named = self.network.named_parameters()
        return [name for name, value in named if name in head and value.requires_grad]

    def classifier(self) -> dict[str, nn.Parameter]:
        """W_b: weights drawn as ``nn.Linear`` draws them, and biases of zero."""
        like = self.linear_head().weight
        drawn = nn.Linear(like.shape[1], self.train_classes).to(like)
        nn.init.zeros_(drawn.bias)
        names = head_names(self.network)
        return {_of_classifier(name): getattr(drawn, _leaf(name)) for name in names}

    def meta_backward(self, batch: Batch) -> Scores:
        if "classes" not in batch:
            raise AlgorithmError(
                f'{self.name} pre-trains on the classes of samples; the batch has no "classes"'
            )
        (support, _), (query, _) = batch["train"], batch["test"]
        support_classes, query_classes = batch["classes"]
        return super().meta_backward(
            {"train": (support, support_classes), "test": (query, query_classes)}
        )

    def meta_gradient(self, tasks: Tasks) -> tuple[Tensor, Sequence[Tensor | None]]:
        theta = self.with_classifier(len(tasks))
        support = self.inner_loop.forward(theta, tasks.support_inputs)
        query = self.inner_loop.query(theta, tasks)
        losses = task_losses(
            torch.cat([support, query], 1),
            torch.cat([tasks.support_targets, tasks.query_targets], 1),
        )
        gradients = torch.autograd.grad(losses.sum(), self.parameters(), allow_unused=True)
        return query, gradients

    def with_classifier(self, tasks: int) -> Fast:
        """theta for so many tasks, with W_b in the head's place."""
        theta = self.inner_loop.initial(tasks, create_graph=True)
        for name in head_names(self.network):
            shared = self.beside[_of_classifier(name)]
            theta[name] = shared.expand(tasks, *shared.shape)
        return theta

    @classmethod
    def gradients_per_task(cls, settings: Mapping[str, Any]) -> int:
        """One on each of the two sets."""
        return 2


@register("finetune_pp")
class FineTunePlusPlus(FineTune):
    """Baseline++: the same with cosine similarities for both classifiers (section 3.2).

    The score of class k is scale * cos(f_theta(x), w_k). The paper's code has a scale of 2, or of
    10 where there are more than 200 classes, and learns a norm for each class as well, which the
    paper's equation, and this, leave out.

    Args:
        model, train_classes, settings: as for :class:`FineTune`.
        scale: what the cosines are multiplied by before the softmax.
    """

    summary = "finetune with cosine similarities (Baseline++, Chen et al. 2019)"
    defaults = {"*": {"eval_steps": 20}}

    def __init__(self, model: nn.Module, *, scale: float = 10.0, **settings: Any) -> None:
        if not 0 < scale < float("inf"):
            raise AlgorithmError(f"scale is {scale}; it must be positive")
        self.scale = scale
        super().__init__(model, **settings)

    def made_network(self) -> nn.Module:
        head = self.linear_head()
        return replaced(self.model, head, CosineLinear(head.weight, self.scale))


class CosineLinear(nn.Module):
    """Scaled cosines of inputs ``(n, d)`` with each row of a weight ``(out, d)``: ``(n, out)``."""

    def __init__(self, weight: Tensor, scale: float) -> None:
        super().__init__()
        self.weight = weight
        self.scale = scale

    def forward(self, inputs: Tensor) -> Tensor:
        rows = self.scale * F.normalize(inputs, dim=-1)
        return F.linear(rows, F.normalize(self.weight, dim=-1))


class TaskCosineLinear(TaskLinear):
    """:class:`CosineLinear` over many tasks at once."""

    def __init__(self, layer: CosineLinear, *shared: Any) -> None:
        super().__init__(layer, *shared)
        self.scale = layer.scale

    def value(self, attribute: str) -> Tensor | None:
        weight = super().value(attribute)
        return None if weight is None else F.normalize(weight, dim=-1)

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(self.scale * F.normalize(inputs, dim=-1))


LAYERS[CosineLinear] = TaskCosineLinear


def _of_classifier(name: str) -> str:
    """W_b's parameter that takes the place of a parameter of the head."""
    return f"classifier.{_leaf(name)}"


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
