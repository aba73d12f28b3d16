"""Joint pretraining, the baseline of Finn et al. 2017 (arXiv 1703.03400), section 5.1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from algorithms.base import Algorithm, register
from algorithms.inner_loop import Tasks


@register("pretrained")
class Pretrained(Algorithm):
    """One network trained on all tasks jointly, and fine-tuned in evaluation: MAML without its
    inner steps.

    The meta-gradient is grad_theta of the mean of L_query_i(theta). In classification it learns
    nothing, for a task's labels are a permutation of its own.
    """

    without = frozenset({"inner_steps", "inner_batch"})
    summary = "one network for all tasks, fine-tuned (baseline of Finn et al. 2017)"
    defaults = {
        "sinusoid": {
            "inner_lr": 0.02,
            "iterations": 2000,
            "meta_batch": 25,
            "test_shots": 10,
            "eval_steps": 10,
        }
    }

    def meta_gradient(self, tasks: Tasks) -> tuple[Tensor, Sequence[Tensor | None]]:
        (theta,) = self.inner_loop.trajectory(tasks, 0, create_graph=True)
        outputs, losses = self.query_losses(theta, tasks)
        return outputs, torch.autograd.grad(losses.sum(), self.parameters(), allow_unused=True)

    @classmethod
    def gradients_per_task(cls, settings: Mapping[str, Any]) -> int:
        return 1
