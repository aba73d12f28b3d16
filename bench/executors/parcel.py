"""Data sets as many processes can share them: one copy a machine, mapped and not read.

A source is pickled with the contents of its tensors apart. These are the bulk of it, and can lie in
a file, or in a cluster's object store, from which each process maps them into its memory.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bench.files import whole, write_bytes

Bytes = npt.NDArray[np.uint8]
ALIGNMENT = 64


class _Pickler(pickle.Pickler):
    """Takes a tensor's contents as an array, which pickle's protocol 5 keeps apart."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.device.type == "cpu":
            return _tensor, (value.detach().contiguous().numpy(),)
        return NotImplemented


def _tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an object store's memory is read-only, as a source is
        return torch.from_numpy(array)


def pack(value: Any) -> tuple[bytes, list[Bytes]]:
    """A value without the contents of its arrays, and these."""
    head, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(head, protocol=5, buffer_callback=buffers.append).dump(value)
    return head.getvalue(), [np.frombuffer(b.raw(), dtype=np.uint8) for b in buffers]


def unpack(head: bytes, contents: Sequence[Bytes]) -> Any:
    """What :func:`pack` took apart; its arrays are the contents, not copies."""
    return pickle.loads(head, buffers=contents)


def write(value: Any, path: Path) -> None:
    """Write a value to two files, ``path`` and one of the contents beside it."""
    head, contents = pack(value)
    places, place = [], 0
    for part in contents:
        places.append((place, len(part)))
        place += -(-len(part) // ALIGNMENT) * ALIGNMENT
    with whole(_beside(path)) as aside, aside.open("wb") as file:
        for (first, _), part in zip(places, contents, strict=True):
            file.seek(first)
            file.write(part.data)
        file.truncate(max(place, 1))  # nothing cannot be mapped
    write_bytes(path, pickle.dumps((head, places)))


def read(path: Path) -> Any:
    """What :func:`write` wrote, its contents mapped: processes that read it share them."""
    head, places = pickle.loads(path.read_bytes())
    mapped = np.memmap(_beside(path), dtype=np.uint8, mode="c")
    return unpack(head, [mapped[first : first + size] for first, size in places])


def _beside(path: Path) -> Path:
    return path.with_suffix(".contents")
