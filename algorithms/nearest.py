"""The nearest class mean of raw pixels: the floor that every algorithm has to beat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from algorithms.base import Algorithm, register
from algorithms.inner_loop import Tasks
from algorithms.protonet import class_means, class_members, squared_distances


@register("nearest")
class Nearest(Algorithm):
    """A query sample has the class whose support samples' mean is nearest to it (Euclidean).

    Nothing is learned: it has no meta-parameters, the model is not used, and a meta-step only
    scores. It trains for one iteration unless told otherwise, since a training has at least one.
    """

    summary = "nearest class mean of raw pixels: learns nothing"
    defaults = {"*": {"iterations": 1, "eval_steps": 0}}

    def __init__(self, model: nn.Module, *, engine: str = "auto") -> None:
        super().__init__(model, engine=engine)
        self.meta_parameters = {}
        self.inner_steps = 0

    def meta_gradient(self, tasks: Tasks) -> tuple[Tensor, Sequence[Tensor | None]]:
        return self.similarities(tasks), []

    def predictions(self, tasks: Tasks, steps: int) -> Iterator[Tensor]:
        for _ in range(steps + 1):
            yield self.similarities(tasks)

    def similarities(self, tasks: Tasks) -> Tensor:
        """Minus the squared distance of every query sample to every mean, ``(tasks, m, ways)``."""
        means = class_means(tasks.support_inputs, class_members(tasks.support_targets))
        return -squared_distances(tasks.query_inputs, means)

    @classmethod
    def gradients_per_task(cls, settings: Mapping[str, Any]) -> int:
        return 0
