"""Files written whole or not at all, and on the disk before they have their names.

A rename survives a loss of power only if what it names was flushed before, and the folder that
holds the name after it; every file of a run is written this way.
"""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pandas as pd

from bench.errors import StorageError


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Do something to a file or folder of a run.

    Raises:
        StorageError: the system would not, for lack of space or of the right.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(error.errno or errno.EIO, reason, str(path)) from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to, beside ``path``, which it becomes once the block has ended well.

    Raises:
        StorageError: it could not be written.
    """
    aside = path.with_name(f"{path.name}.part")
    try:
        with storing(path):
            aside.unlink(missing_ok=True)  # it may be a link to a file elsewhere
            yield aside
            sync(aside)
            aside.replace(path)
            sync(path.parent)
    except BaseException:
        with suppress(OSError):
            aside.unlink()  # its space may be what is lacking
        raise


def write_bytes(path: Path, contents: bytes) -> None:
    """Write a file, whole or not at all."""
    with whole(path) as aside:
        aside.write_bytes(contents)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as Parquet, without its index, whole or not at all."""
    contents = io.BytesIO()
    table.to_parquet(contents, index=False)
    write_bytes(path, contents.getvalue())


def make_folder(path: Path) -> None:
    """Make a folder and those it lies in, unless they are there.

    Raises:
        StorageError: it could not be made.
    """
    if not path.is_dir():
        make_folder(path.parent)
        with storing(path):
            path.mkdir(exist_ok=True)
            sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or a folder's list of names to the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise  # some file systems flush no folders
    finally:
        os.close(opened)


def filled(text: str, name: str, block: str) -> str:
    """A text with a block between the markers of that name; as it was where it has none."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    between = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    return between.sub(lambda found: begin + block + end, text)
