"""Batch normalisation of many tasks at once, each by its own statistics, differentiable twice.

A scale, a shift, a rectifier and a pooling that follow are done in the same pass over memory, where
there are compiled kernels: of what a pooling leaves out nothing is written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from algorithms.kernels import Windows, kernels_for


def normalise(
    rows: Tensor,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    relu: bool,
    windows: Windows | None = None,
) -> Tensor:
    """Each group's rows less their mean, over their standard deviation, then scaled and shifted.

    Args:
        rows: ``(groups, n, channels)``; mean and variance are over ``n``.
        eps: added to the variance.
        weight: scale ``(groups, 1, channels)``, or None for 1.
        bias: shift ``(groups, 1, channels)``, or None for 0.
        relu: rectify the result.
        windows: take the highest of each channel in each of these, the first of equals; for rows
            that it :func:`pools`.

    Returns:
        Like ``rows``, or ``(groups, windows, channels)``.

    Raises:
        ValueError: shapes or types that do not fit one another.
    """
    like = (rows.shape[0], 1, rows.shape[2])
    for each in (weight, bias):  # a compiled kernel takes this on trust
        if each is not None and (each.shape, each.dtype) != (like, rows.dtype):
            given = f"{tuple(each.shape)} in {each.dtype}"
            raise ValueError(f"scale and shift are {given}, not {like} in {rows.dtype}")
    if windows is not None and rows.shape[1] % (windows.height * windows.width):
        raise ValueError(f"{rows.shape[1]} rows are no pictures of {windows[0]} x {windows[1]}")
    if not rows.numel():
        return rows
    weight, bias = _contiguous(weight), _contiguous(bias)
    outputs: Tensor = Normalise.apply(rows.contiguous(), weight, bias, eps, relu, windows)[0]  # type: ignore[no-untyped-call]
    return outputs


def pools(rows: Tensor) -> bool:
    """Whether :func:`normalise` can take a pooling along: where there are compiled kernels."""
    return kernels_for(rows) is not None


class Normalise(torch.autograd.Function):
    """:func:`normalise`: with x the rows, s = 1 / sqrt(var x + eps) and y = (x - mean x) s, the
    outputs are relu(w y + b), or the highest of each window. Also returns y and s ``(groups, 1,
    channels)``.

    With h the gradient that arrives, where the rectifier passes it and at a window's place, k = w h
    and means over n, the derivative is Ioffe and Szegedy's (2015, section 3):
    dx = s (k - mean k - y mean(k y)).
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        relu: bool,
        windows: Windows | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        compiled = kernels_for(rows)
        highest = None
        if compiled is not None:
            keep = any(ctx.needs_input_grad)
            outputs, standard, scale, highest = compiled.normalise(
                rows, weight, bias, eps, relu, windows, keep
            )
        else:
            assert windows is None
            var, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
            scale = torch.rsqrt(var + eps)
            standard = (rows - mean).mul_(scale)
            outputs = _affine(standard, weight, bias)
            outputs = outputs.relu() if relu else outputs.clone()
        ctx.relu, ctx.windows = relu, windows
        ctx.save_for_backward(standard, scale, weight, bias, highest)
        ctx.set_materialize_grads(False)
        return outputs, standard, scale

    @staticmethod
    def backward(
        ctx: Any, to_outputs: Tensor | None, to_standard: Tensor | None, to_scale: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        standard, scale, weight, bias, highest = ctx.saved_tensors
        through = None
        if to_scale is not None:  # ds = -s^2 mean(y dx)
            through = scale * scale * to_scale / -standard.shape[1]
        elif to_outputs is None and to_standard is None:
            return None, None, None, None, None, None
        if to_outputs is None:
            to_outputs = torch.zeros_like(standard if highest is None else highest)
        to_rows, to_weight, to_bias = NormaliseBackward.apply(  # type: ignore[no-untyped-call]
            *(to_outputs, to_standard, through, standard, scale, weight, bias, highest),
            *(ctx.relu, ctx.windows),
        )
        to_weight, to_bias = (
            gradient if parameter is not None else None
            for gradient, parameter in ((to_weight, weight), (to_bias, bias))
        )
        return to_rows, to_weight, to_bias, None, None, None


class NormaliseBackward(torch.autograd.Function):
    """The derivative of :class:`Normalise`, transposed: to its rows, weight and bias.

    ``to_standard`` and ``through``, what arrives by way of y and s, are there in the second
    derivative alone, and are not differentiated again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        to_outputs: Tensor,
        to_standard: Tensor | None,
        through: Tensor | None,
        standard: Tensor,
        scale: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        highest: Tensor | None,
        relu: bool,
        windows: Windows | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        to_outputs, to_standard = to_outputs.contiguous(), _contiguous(to_standard)
        given = (to_outputs, to_standard, through, standard, scale, weight, bias)
        compiled = kernels_for(standard)
        if compiled is None:
            found = _backward(*given, relu)
        else:
            found = compiled.normalise_backward(*given, highest, relu, windows)
        ctx.relu, ctx.windows = relu, windows
        ctx.first = to_standard is None and through is None
        _, sum_h_y, sum_h = found
        ctx.save_for_backward(to_outputs, standard, scale, weight, bias, highest, sum_h, sum_h_y)
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, u: Tensor | None, v_weight: Tensor | None, v_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if not ctx.first:
            raise RuntimeError("batch normalisation of many tasks has no third derivative")
        to_outputs, standard, scale, weight, bias, highest, sum_h, sum_h_y = ctx.saved_tensors
        u = torch.zeros_like(standard) if u is None else u.contiguous()
        vectors = (_contiguous(v_weight), _contiguous(v_bias))
        given = (u, *vectors, to_outputs, standard, scale, weight, bias)
        compiled = kernels_for(standard)
        if compiled is None:
            found = _twice(*given, sum_h_y, ctx.relu)
        else:
            found = compiled.normalise_twice(*given, highest, sum_h, sum_h_y, ctx.relu, ctx.windows)
        to_to_outputs, to_standard, to_scale, to_weight = found
        to_parameters = (None if weight is None else to_weight, None)
        nothing = (None, None, None)
        return to_to_outputs, None, None, to_standard, to_scale, *to_parameters, *nothing


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
    to_outputs: Tensor,
    to_standard: Tensor | None,
    through: Tensor | None,
    standard: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    h = _passed(to_outputs, standard, weight, bias, relu=relu)
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
