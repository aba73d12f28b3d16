"""Reptile: Nichol, Achiam and Schulman 2018, On First-Order Meta-Learning Algorithms
(arXiv 1803.02999)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.base import Algorithm, Batch, Scores, register
from algorithms.inner_loop import NO_MOMENTS, Moments, Tasks

MASS = "mass of moments"
"""In what is carried, beside each parameter's average: the sum of their weights."""


@register("reptile")
class Reptile(Algorithm):
    """Move the initialisation towards the parameters that each task ends at.

    With theta_i the parameters after k inner steps on task i (algorithm 1), the meta-gradient is
    theta - mean(theta_i), so an outer SGD step of size epsilon is theta + epsilon (mean(theta_i) -
    theta). The inner steps use the support set alone; the query set only scores the result.

    Args:
        model, settings: as for :class:`algorithms.base.Algorithm`.
        keep_moments: the inner Adam goes on, from task to task, with the averages of squared
            gradients that it has, and begins each task of an evaluation with those of the end of
            training, as in the paper's code (openai/supervised-reptile); the tasks of a
            meta-batch, which there follow one another, begin alike, and the mean of what they end
            with goes on. Without it Adam begins each task anew, so that its first step moves
            every weight by all of alpha. Plain gradient descent has nothing to keep.
    """

    summary = "move towards the adapted parameters (Nichol et al. 2018)"
    defaults = {
        "*": {
            "meta_optimizer": "sgd",
            "meta_lr": 1.0,
            "meta_schedule": "linear",
            "train_shots": 10,
            "inner_optimizer": "adam",
            "inner_lr": 0.003,
            "inner_batch": 10,
            "inner_steps": 5,
            "eval_steps": 5,
        },
        "sinusoid": {
            "iterations": 2000,
            "meta_batch": 25,
            "test_shots": 10,
            "eval_steps": 10,
            "inner_optimizer": "sgd",
            "inner_lr": 0.02,
            "inner_batch": None,
        },
    }

    def __init__(self, model: nn.Module, *, keep_moments: bool = True, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.ended: list[Moments] = []
        if keep_moments and self.inner_loop.optimizer == "adam":
            theta = {name: value.detach() for name, value in self.meta_parameters.items()}
            self.carried = {name: torch.zeros_like(value) for name, value in theta.items()}
            self.carried[MASS] = next(iter(theta.values())).new_zeros(())

    def moments(self) -> Moments:
        if not self.carried:
            return NO_MOMENTS
        squares = {name: self.carried[name][None] for name in self.adapted()}
        return Moments(squares, float(self.carried[MASS]))

    def meta_backward(self, batch: Batch) -> Scores:
        """Besides, keep the mean of what the tasks' Adam ended with."""
        scores = super().meta_backward(batch)
        if self.carried:
            for name in self.adapted():
                ends = torch.cat([part.squares[name] for part in self.ended])
                self.carried[name].copy_(ends.mean(0))
            self.carried[MASS].fill_(self.ended[0].mass)
            self.ended = []
        return scores

    def adapted(self) -> list[str]:
        """All of them, as in its code: what does not adapt, it would never learn."""
        return list(self.meta_parameters)

    def meta_gradient(self, tasks: Tasks) -> tuple[Tensor, Sequence[Tensor | None]]:
        fast = self.adapt(tasks, create_graph=False)
        if self.carried:
            self.ended.append(self.inner_loop.reached)
        with torch.no_grad():
            outputs, _ = self.query_losses(fast, tasks)
            moved = [(theta - fast[name]).sum(0) for name, theta in self.meta_parameters.items()]
        return outputs, moved

    @classmethod
    def gradients_per_task(cls, settings: Mapping[str, Any]) -> int:
        return int(settings["inner_steps"])
