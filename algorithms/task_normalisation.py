"""Batch normalisation of many tasks at once, each by its own statistics, differentiable twice.

A scale, a shift and a rectifier that follow are done in the same pass over memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from algorithms.kernels import kernels_for


def normalise(
    rows: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None, *, relu: bool
) -> Tensor:
    """Each group's rows less their mean, over their standard deviation, then scaled and shifted.

    Args:
        rows: ``(groups, n, channels)``; mean and variance are over ``n``.
        eps: added to the variance.
        weight: scale ``(groups, 1, channels)``, or None for 1.
        bias: shift ``(groups, 1, channels)``, or None for 0.
        relu: rectify the result.

    Returns:
        Like ``rows``.

    Raises:
        ValueError: shapes or types that do not fit one another.
    """
    like = (rows.shape[0], 1, rows.shape[2])
    for each in (weight, bias):  # a compiled kernel takes this on trust
        if each is not None and (each.shape, each.dtype) != (like, rows.dtype):
            given = f"{tuple(each.shape)} in {each.dtype}"
            raise ValueError(f"scale and shift are {given}, not {like} in {rows.dtype}")
    if not rows.numel():
        return rows
    weight, bias = _contiguous(weight), _contiguous(bias)
    outputs: Tensor = Normalise.apply(rows.contiguous(), weight, bias, eps, relu)[0]  # type: ignore[no-untyped-call]
    return outputs


class Normalise(torch.autograd.Function):
    """:func:`normalise`: with x the rows, s = 1 / sqrt(var x + eps) and y = (x - mean x) s, the
    outputs are relu(w y + b). Also returns y and s ``(groups, 1, channels)``.

    With h the gradient that arrives, where the rectifier passes it, k = w h and means over n, the
    derivative is Ioffe and Szegedy's (2015, section 3): dx = s (k - mean k - y mean(k y)).
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        compiled = kernels_for(rows)
        if compiled is not None:
            keep = any(ctx.needs_input_grad)
            outputs, standard, scale = compiled.normalise(rows, weight, bias, eps, relu, keep)
        else:
            var, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
            scale = torch.rsqrt(var + eps)
            standard = (rows - mean).mul_(scale)
            outputs = _affine(standard, weight, bias)
            outputs = outputs.relu() if relu else outputs.clone()
        ctx.relu = relu
        ctx.save_for_backward(standard, scale, weight, bias)
        ctx.set_materialize_grads(False)
        return outputs, standard, scale

    @staticmethod
    def backward(
        ctx: Any, to_outputs: Tensor | None, to_standard: Tensor | None, to_scale: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        standard, scale, weight, bias = ctx.saved_tensors
        through = None
        if to_scale is not None:  # ds = -s^2 mean(y dx)
            through = scale * scale * to_scale / -standard.shape[1]
        elif to_outputs is None and to_standard is None:
            return None, None, None, None, None
        to_rows, to_weight, to_bias = NormaliseBackward.apply(  # type: ignore[no-untyped-call]
            to_outputs, to_standard, through, standard, scale, weight, bias, ctx.relu
        )
        to_weight, to_bias = (
            gradient if parameter is not None else None
            for gradient, parameter in ((to_weight, weight), (to_bias, bias))
        )
        return to_rows, to_weight, to_bias, None, None


class NormaliseBackward(torch.autograd.Function):
    """The derivative of :class:`Normalise`, transposed: to its rows, weight and bias.

    ``to_standard`` and ``through``, what arrives by way of y and s, are there in the second
    derivative alone, and are not differentiated again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        to_outputs: Tensor | None,
        to_standard: Tensor | None,
        through: Tensor | None,
        standard: Tensor,
        scale: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        relu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        to_outputs, to_standard = _contiguous(to_outputs), _contiguous(to_standard)
        compiled = kernels_for(standard)
        function = _backward if compiled is None else compiled.normalise_backward
        found = function(to_outputs, to_standard, through, standard, scale, weight, bias, relu)
        ctx.relu, ctx.first = relu, to_standard is None and through is None
        # The second of what was found is the sum over n of h y.
        ctx.save_for_backward(to_outputs, standard, scale, weight, bias, found[1])
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, u: Tensor | None, v_weight: Tensor | None, v_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if not ctx.first:
            raise RuntimeError("batch normalisation of many tasks has no third derivative")
        to_outputs, standard, scale, weight, bias, sum_h_y = ctx.saved_tensors
        u = torch.zeros_like(standard) if u is None else u.contiguous()
        compiled = kernels_for(standard)
        function = _twice if compiled is None else compiled.normalise_twice
        to_to_outputs, to_standard, to_scale, to_weight = function(
            u,
            _contiguous(v_weight),
            _contiguous(v_bias),
            to_outputs,
            standard,
            scale,
            weight,
            bias,
            sum_h_y,
            ctx.relu,
        )
        if weight is None:
            return to_to_outputs, None, None, to_standard, to_scale, None, None, None
        return to_to_outputs, None, None, to_standard, to_scale, to_weight, None, None


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


# The same in torch's operators, where there are no compiled kernels.


def _affine(standard: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    scaled = standard if weight is None else standard * weight
    return scaled if bias is None else scaled + bias


def _passed(gradient: Tensor, standard: Tensor, *affine: Any, relu: bool) -> Tensor:
    """A gradient where the rectifier passes it."""
    return gradient * (_affine(standard, *affine) > 0) if relu else gradient


def _backward(
    to_outputs: Tensor | None,
    to_standard: Tensor | None,
    through: Tensor | None,
    standard: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    h = torch.zeros_like(standard) if to_outputs is None else to_outputs
    h = _passed(h, standard, weight, bias, relu=relu)
    k = h if weight is None else h * weight
    if to_standard is not None:
        k = k + to_standard
    to_rows = scale * _centred(k, standard)
    if through is not None:
        to_rows = torch.addcmul(to_rows, standard, through)
    return to_rows, (h * standard).sum(1, keepdim=True), h.sum(1, keepdim=True)


def _twice(
    u: Tensor,
    v_weight: Tensor | None,
    v_bias: Tensor | None,
    to_outputs: Tensor,
    standard: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sum_h_y: Tensor,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = _passed(to_outputs, standard, weight, bias, relu=relu)
    centred, size = _centred(u, standard), scale if weight is None else scale * weight
    to_h = _affine(size * centred, None, v_bias)
    u_y = (u * standard).mean(1, keepdim=True)
    to_standard = -size * (u * (sum_h_y / u.shape[1]) + h * u_y)
    if v_weight is not None:
        to_h = torch.addcmul(to_h, standard, v_weight)
        to_standard = torch.addcmul(to_standard, h, v_weight)
    along = (h * centred).sum(1, keepdim=True)
    to_scale = along if weight is None else along * weight
    to_to_outputs = _passed(to_h, standard, weight, bias, relu=relu)
    return to_to_outputs, to_standard, to_scale, scale * along


def _centred(rows: Tensor, standard: Tensor) -> Tensor:
    """k - mean k - y mean(k y): symmetric, and so its own transpose."""
    along = (rows * standard).mean(1, keepdim=True)
    return (rows - rows.mean(1, keepdim=True)).addcmul_(standard, -along)
