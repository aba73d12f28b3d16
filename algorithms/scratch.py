"""A network that never met another task: what meta-training is worth is the distance to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from algorithms.base import Algorithm, register
from algorithms.inner_loop import Tasks


@register("scratch")
class Scratch(Algorithm):
    """Adapt to a task's support set from the model's random weights.

    There is no meta-training: the meta-gradient is zero, which leaves the weights where they are
    under every outer optimizer without weight decay. It trains for one iteration unless told
    otherwise, since a training has at least one.
    """

    summary = "adapts random weights, without meta-training"
    defaults = {
        "*": {"iterations": 1, "inner_steps": 10, "eval_steps": 10, "inner_lr": 0.1},
        "sinusoid": {"test_shots": 10, "inner_lr": 0.01},
    }

    def meta_gradient(self, tasks: Tasks) -> tuple[Tensor, Sequence[Tensor | None]]:
        fast = self.adapt(tasks, create_graph=False)
        outputs, _ = self.query_losses(fast, tasks)
        return outputs, [None for _ in self.parameters()]

    @classmethod
    def gradients_per_task(cls, settings: Mapping[str, Any]) -> int:
        return int(settings["inner_steps"])
