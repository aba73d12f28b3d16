"""What is costly to derive from data (rendered glyphs, decoded archives), kept between runs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from datasets.base import cache_folder

Tensors = dict[str, Tensor]


def cached(name: str, identity: str, build: Callable[[], Tensors]) -> Tensors:
    """The tensors that ``build`` makes, read back from the user's cache folder once they are there.

    The file is written aside and renamed, so that a reader never sees half of it and two processes
    that build at once both end with a whole file. A file that cannot be read is built again; a
    folder that cannot be written costs the caching, not the run.

    Args:
        name: what the file's name begins with.
        identity: everything that decides the content; a change of it is another file.
        build: makes the tensors; pure.
    """
    digest = hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:16]
    path = cache_folder() / "derived" / f"{name}-{digest}.safetensors"
    with contextlib.suppress(OSError, SafetensorError):
        return load_file(path)
    tensors = build()
    with contextlib.suppress(OSError, SafetensorError):
        write(tensors, path)
    return tensors


def write(tensors: Tensors, path: Path) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    os.close(handle)
    try:
        save_file(tensors, aside)
        Path(aside).replace(path)
    finally:
        Path(aside).unlink(missing_ok=True)
