"""Files written whole or not at all, and texts whose tables are written anew."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to, beside ``path``, which it becomes once the block has ended well."""
    aside = path.with_name(f"{path.name}.part")
    yield aside
    aside.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text, on the disk before it has its name."""
    with whole(path) as aside, aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def filled(text: str, name: str, block: str) -> str:
    """A text with a block between the markers of that name; as it was where it has none."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    between = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    return between.sub(lambda found: begin + block + end, text)
