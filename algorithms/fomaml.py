"""First-order MAML: Finn et al. 2017, section 5.2; Nichol et al. 2018 (arXiv 1803.02999)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from algorithms.base import Algorithm, register
from algorithms.inner_loop import Tasks
from algorithms.maml import MAML


@register("fomaml")
class FOMAML(Algorithm):
    """MAML with d theta' / d theta taken to be the identity.

    The meta-gradient is the mean of grad L_query_i at the adapted parameters theta'_i: the inner
    steps move the parameters but are not differentiated.
    """

    summary = "the gradient at the adapted parameters (Finn et al. 2017)"
    defaults = MAML.defaults

    def meta_gradient(self, tasks: Tasks) -> tuple[Tensor, Sequence[Tensor | None]]:
        fast = self.adapt(tasks, create_graph=False)
        outputs, losses = self.query_losses(fast, tasks)
        at_fast = [fast[name] for name in self.meta_parameters]
        gradients = torch.autograd.grad(losses.sum(), at_fast, allow_unused=True)
        return outputs, [None if g is None else g.sum(0) for g in gradients]
