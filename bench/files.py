"""Files written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to, beside ``path``, which it becomes once the block has ended well."""
    aside = path.with_name(f"{path.name}.part")
    aside.unlink(missing_ok=True)  # it may be a link to a file elsewhere
    yield aside
    aside.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text, on the disk before it has its name."""
    with whole(path) as aside, aside.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
