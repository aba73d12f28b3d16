"""In what precision products of float32 are taken: torch's own default is a mixture on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

PRECISIONS = ("float32", "tf32", "bf16")


@contextmanager
def products_in(precision: str, device: torch.device) -> Iterator[None]:
    """Take matrix products and convolutions of float32 in float32, or with inputs rounded to 10
    bits (``tf32``; on NVIDIA GPUs, elsewhere it is float32) or to 7 bits (``bf16``, by torch's
    autocast), which is faster where the device has units for it. Sums are of float32 in each.
    Products of other types are left alone; torch's flags are put back as they were.

    By torch's default convolutions are taken in tf32 and matrix products are not, so that two
    implementations of one layer differ by 1e-3.
    """
    # Without its cache, which would keep the rounded weights of every inner step.
    autocast = torch.autocast(
        device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False
    )
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = (matmul.allow_tf32, cudnn.allow_tf32)
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
        with autocast:
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def factor(values: Tensor) -> Tensor:
    """Values as a factor of a product that is not one of torch's own layers: rounded where
    autocast says so."""
    kind = values.device.type
    if values.dtype != torch.float32 or not torch.is_autocast_enabled(kind):
        return values
    return values.to(torch.get_autocast_dtype(kind))


def unrounded(values: Tensor) -> Tensor:
    """Values to be summed or compared, in float32 where autocast had them rounded: a mean and a
    loss need the digits."""
    kind = values.device.type
    if not torch.is_autocast_enabled(kind) or values.dtype != torch.get_autocast_dtype(kind):
        return values
    return values.float()
