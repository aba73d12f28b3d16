"""Meta-Curvature: Park and Oliva 2019 (arXiv 1902.03356)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.base import register
from algorithms.maml import MAML
from algorithms.meta_sgd import MetaSGD


@register("metacurvature")
class MetaCurvature(MAML):
    """MAML that learns a linear map of each inner gradient as well.

    theta'_i = theta - alpha MC(grad L_support_i(theta)), and the meta-gradient is that of the mean
    of L_query_i(theta'_i) with respect to theta and MC (section 3). The gradient G of a convolution
    is a tensor over output channels, input channels and the places of the kernel, that of a linear
    layer one over outputs and inputs, and a bias's has one mode. MC multiplies each mode by a
    matrix, G x_1 M_o x_2 M_i x_3 M_f; every matrix starts as the identity. alpha is not learned.
    """

    summary = "MAML with a learned linear map of each gradient (Park and Oliva 2019)"
    defaults = MetaSGD.defaults  # what was learned for one step can diverge in the next ones

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        super().__init__(model, **settings)
        for name in self.adapted():
            like = self.meta_parameters[name].detach()
            for mode, size in enumerate(modes(like.shape)):
                identity = torch.eye(size, dtype=like.dtype, device=like.device)
                self.beside[f"curvature.{name}.{mode}"] = nn.Parameter(identity)

    def direction(self, name: str, gradient: Tensor) -> Tensor:
        shape = gradient.shape
        tensor = gradient.reshape(shape[0], *modes(shape[1:]))
        for mode in range(tensor.dim() - 1):
            matrix = self.beside[f"curvature.{name}.{mode}"]
            tensor = (tensor.movedim(mode + 1, -1) @ matrix.T).movedim(-1, mode + 1)
        return tensor.reshape(shape)


def modes(shape: Sequence[int]) -> tuple[int, ...]:
    """The sizes of a parameter's modes: all that follows the first two is one."""
    return tuple(shape) if len(shape) <= 2 else (*shape[:2], math.prod(shape[2:]))
