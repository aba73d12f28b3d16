"""MAML++: Antoniou, Edwards and Storkey 2019, How to train your MAML (arXiv 1810.09502)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.base import AlgorithmError, register
from algorithms.inner_loop import Tasks
from algorithms.maml import MAML


@register("maml_pp")
class MAMLPlusPlus(MAML):
    """MAML with the remedies of section 4, each of which the training anneals or learns.

    With theta_j the parameters after j of K inner steps:

    - Multi-step loss: the query loss is sum_j v_j L_query(theta_j) (equation 4). The weights v
      begin equal and move linearly to the last step alone.
    - Derivative-order annealing: inner gradients are constants at first, and are differentiated
      later.
    - A learned step size for each parameter tensor of the network and each step, each starting at
      ``inner_lr``. Steps of an evaluation beyond the K-th use the K-th's.
    - Cosine annealing of the outer step is the outer loop's ``meta_schedule``.

    Left out is what is not of the gradient: running batch-norm statistics for each step (``norm``
    says whose statistics are used, and the paper's code too normalises by the batch in hand),
    batch-norm shifts for each step, and the ensemble of the five best checkpoints.

    Args:
        model: any module, as for :class:`algorithms.Algorithm`.
        multi_step_until: share of the training after which the loss is the last step's alone.
        first_order_until: share of the training after which the inner gradients are differentiated.
        settings: those of :class:`algorithms.Algorithm`.
    """

    summary = "MAML with multi-step loss, learned step sizes and annealing (Antoniou et al. 2019)"
    defaults = {
        "*": {"inner_steps": 3, "inner_lr": 0.1, "meta_schedule": "cosine"},
        "sinusoid": {**MAML.defaults["sinusoid"], "inner_steps": 5},
    }

    def __init__(
        self,
        model: nn.Module,
        *,
        multi_step_until: float = 0.1,
        first_order_until: float = 0.5,
        **settings: Any,
    ) -> None:
        for name, share in (
            ("multi_step_until", multi_step_until),
            ("first_order_until", first_order_until),
        ):
            if not 0 <= share <= 1:
                raise AlgorithmError(f"{name} is {share}; it must be from 0 to 1")
        super().__init__(model, **settings)
        self.multi_step_until = multi_step_until
        self.first_order_until = first_order_until
        for name in self.adapted():
            like = self.meta_parameters[name]
            rates = like.detach().new_full((self.inner_steps,), self.inner_lr)
            self.beside[f"rates.{name}"] = nn.Parameter(rates)

    def rate(self, name: str, step: int) -> Tensor:
        rates = self.beside[f"rates.{name}"]
        return rates[min(step, len(rates) - 1)]

    def step_weights(self) -> list[float]:
        """v_1 .. v_K: from 1/K each to 0 but for the last, which takes what the others lose."""
        annealed = self.progress / self.multi_step_until if self.multi_step_until else 1.0
        each = max(0.0, 1 - annealed) / self.inner_steps
        return [each] * (self.inner_steps - 1) + [1 - each * (self.inner_steps - 1)]

    def meta_gradient(self, tasks: Tasks) -> tuple[Tensor, Sequence[Tensor | None]]:
        first_order = self.progress < self.first_order_until
        _, *trajectory = self.inner_loop.trajectory(
            tasks, self.inner_steps, create_graph=True, first_order=first_order
        )
        losses = []
        for weight, fast in zip(self.step_weights(), trajectory, strict=True):
            if weight:  # the last step's is never zero
                outputs, each = self.query_losses(fast, tasks)
                losses.append(weight * each.sum())
        loss = torch.stack(losses).sum()
        return outputs, torch.autograd.grad(loss, self.parameters(), allow_unused=True)
