"""In what precision float32 products are taken on a GPU, where torch's own default is a mixture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = ("float32", "tf32")


@contextmanager
def products_in(precision: str, device: torch.device) -> Iterator[None]:
    """Take matrix products and convolutions of float32 on an NVIDIA GPU in float32, or with their
    inputs rounded to 10 bits (``tf32``), which is faster; torch's flags are left as they were.

    By torch's default convolutions are taken in tf32 and matrix products are not, so that two
    implementations of one layer differ by 1e-3.
    """
    if device.type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = (matmul.allow_tf32, cudnn.allow_tf32)
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
