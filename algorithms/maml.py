"""MAML: Finn, Abbeel and Levine 2017, Model-Agnostic Meta-Learning (arXiv 1703.03400)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from algorithms.base import Algorithm, register
from algorithms.inner_loop import Tasks


@register("maml")
class MAML(Algorithm):
    """Second-order MAML: differentiate the query loss through the inner steps.

    With theta'_i = theta - alpha grad L_support_i(theta) (equation 1, repeated for more steps),
    the meta-gradient is grad_theta of the mean of L_query_i(theta'_i).
    """

    summary = "gradient through the inner steps (Finn et al. 2017)"
    defaults = {
        "sinusoid": {
            "inner_lr": 0.01,
            "iterations": 2000,
            "meta_batch": 25,
            "test_shots": 10,
            "eval_steps": 10,
        }
    }

    def meta_gradient(self, tasks: Tasks) -> tuple[Tensor, Sequence[Tensor | None]]:
        fast = self.adapt(tasks, create_graph=True)
        outputs, losses = self.query_losses(fast, tasks)
        return outputs, torch.autograd.grad(losses.sum(), self.parameters(), allow_unused=True)
