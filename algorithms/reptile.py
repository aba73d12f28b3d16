"""Reptile: Nichol, Achiam and Schulman 2018, On First-Order Meta-Learning Algorithms
(arXiv 1803.02999)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from algorithms.base import Algorithm, register
from algorithms.inner_loop import Tasks


@register("reptile")
class Reptile(Algorithm):
    """Move the initialisation towards the parameters that each task ends at.

    With theta_i the parameters after k inner steps on task i (algorithm 1), the meta-gradient is
    theta - mean(theta_i), so an outer SGD step of size epsilon is theta + epsilon (mean(theta_i) -
    theta). The inner steps use the support set alone; the query set only scores the result.
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

    def adapted(self) -> list[str]:
        """All of them, as in its code: what does not adapt, it would never learn."""
        return list(self.meta_parameters)

    def meta_gradient(self, tasks: Tasks) -> tuple[Tensor, Sequence[Tensor | None]]:
        fast = self.adapt(tasks, create_graph=False)
        with torch.no_grad():
            outputs, _ = self.query_losses(fast, tasks)
            moved = [(theta - fast[name]).sum(0) for name, theta in self.meta_parameters.items()]
        return outputs, moved

    @classmethod
    def gradients_per_task(cls, settings: Mapping[str, Any]) -> int:
        return int(settings["inner_steps"])
