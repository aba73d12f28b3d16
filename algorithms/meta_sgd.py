"""Meta-SGD: Li, Zhou, Chen and Li 2017, Meta-SGD: Learning to Learn Quickly for Few-Shot Learning
(arXiv 1707.09835)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from algorithms.base import register
from algorithms.maml import MAML


@register("meta_sgd")
class MetaSGD(MAML):
    """MAML that learns a step size for every number in theta as well.

    theta'_i = theta - alpha o grad L_support_i(theta), with o the product of elements (equation 2);
    the meta-gradient is that of the mean of L_query_i(theta'_i) with respect to theta and alpha
    (algorithm 1). Every element of alpha starts at ``inner_lr``, where the paper draws it from a
    uniform distribution, and may become negative. Steps beyond the first use the same alpha.
    """

    summary = "MAML with a learned step size for every weight (Li et al. 2017)"
    # Step sizes that were learned for one step can diverge in the next ones.
    defaults = {
        "*": {"eval_steps": 1},
        "sinusoid": {**MAML.defaults["sinusoid"], "eval_steps": 1},
    }

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        super().__init__(model, **settings)
        for name in self.adapted():
            alpha = torch.full_like(self.meta_parameters[name], self.inner_lr)
            self.beside[f"alpha.{name}"] = nn.Parameter(alpha)

    def rate(self, name: str, step: int) -> Tensor:
        return self.beside[f"alpha.{name}"]
