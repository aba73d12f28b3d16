"""Checkpoints: tensors in a file, with notes of what they belong to and a checksum."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bench.errors import DamagedError
from bench.files import write_bytes

SECONDS = 10.0
"""Between two checkpoints of a work that goes on."""

State = dict[str, Tensor]


def due(saved: float) -> bool:
    """Whether it is time for another checkpoint, the last of which was at ``saved``, as
    :func:`time.monotonic` has it."""
    return time.monotonic() - saved > SECONDS


def write_tensors(tensors: State, path: Path, **notes: str) -> str:
    """Write tensors and notes to a safetensors file, whole or not at all; their checksum."""
    contiguous = {n: v.detach().cpu().contiguous().clone() for n, v in tensors.items()}
    checksum = _digest(contiguous, notes)
    sealed = notes | {"sha256": checksum}
    write_bytes(path, save(contiguous, metadata={"notes": json.dumps(sealed)}))
    return checksum


def read_tensors(path: Path, **notes: str) -> State:
    """Read what :func:`write_tensors` wrote.

    Raises:
        OSError: it cannot be read.
        DamagedError: it is not as it was written.
        ValueError: the notes are other ones.
    """
    try:
        with safe_open(path, framework="pt") as file:
            written = json.loads((file.metadata() or {}).get("notes", "{}"))
            tensors: State = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise DamagedError(f"{path} cannot be read: {error}") from error
    if written.pop("sha256", None) not in (None, _digest(tensors, written)):  # None: an older file
        raise DamagedError(f"{path} does not have its checksum")
    if written != notes:
        raise ValueError(f"{path} belongs to {written}")
    return tensors


def _digest(tensors: State, notes: dict[str, str]) -> str:
    """A checksum of all that a file of tensors says."""
    digest = hashlib.sha256(json.dumps(notes, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"\0{name} {value.dtype} {tuple(value.shape)}\0".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
