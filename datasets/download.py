"""Archives that a dataset reads: found on disk, or fetched and checked."""

from __future__ import annotations

import hashlib
import http.client
import os
import tempfile
import urllib.request
from pathlib import Path
from typing import IO

from datasets.episodes import DatasetError

MOST_BYTES = 1 << 30
"""Of a download; the largest archive that a dataset knows an address of has 169 MB."""

SILENCE = 60
"""Seconds without a byte after which a download is given up."""


def locate(path: Path, *, url: str, md5: str, download: bool) -> Path:
    """``path``, fetched first if it is missing and ``download`` says so.

    A file that is already there is taken as it is: people keep archives that were packed again.

    Raises:
        DatasetError: no such file, and it could not or should not be fetched.
    """
    if not path.is_file():
        if not download:
            raise DatasetError(
                f"{path} is missing; --download (in Python download=True) fetches it from {url}"
            )
        fetch(url, path, md5)
    return path


def fetch(url: str, path: Path, md5: str) -> None:
    """Download ``url`` to ``path``: under another name until its checksum is known to be right.

    Raises:
        DatasetError: the address cannot be read, the folder cannot be written, or the content is
            too large or not what was published. No file is left behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        aside = Path(name)
        try:
            with (
                os.fdopen(handle, "wb") as file,
                urllib.request.urlopen(url, timeout=SILENCE) as answer,
            ):
                _copied(answer, file, url)
            found = digest(aside, "md5")
            if found != md5:
                raise DatasetError(f"{url} sent a file with md5 {found}, not {md5}; it was dropped")
            aside.chmod(0o644)  # mkstemp's files are its maker's alone; data sets are shared
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except (OSError, http.client.HTTPException) as error:
        raise DatasetError(f"{url} could not be fetched to {path}: {error}") from error


def _copied(answer: IO[bytes], file: IO[bytes], url: str) -> None:
    written = 0
    while block := answer.read(1 << 20):
        written += len(block)
        if written > MOST_BYTES:
            raise DatasetError(f"{url} sends more than {MOST_BYTES >> 20} MiB; it was dropped")
        file.write(block)


def digest(path: Path, algorithm: str) -> str:
    """Checksum of a file in hexadecimal; ``algorithm`` is one of hashlib's names."""
    state = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()
