"""What becomes of a cell that goes wrong: a reason, so that the others can go on."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError, CellError, DivergedError, RunError

if TYPE_CHECKING:
    import pandas as pd

PLUGIN = "bench_plugin_"
"""What the names of plug-ins' modules begin with."""


@dataclass(frozen=True)
class Failure:
    """Why a cell came to nothing.

    Attributes:
        line: in one line.
        reason: in full, with the traceback where that tells something.
        diverged_at: the iteration at which its training diverged, if it did.
        unforeseen: what was raised was no answer of this project's; a process in which it was may
            not be sound (as after a fault on a GPU).
    """

    line: str
    reason: str
    diverged_at: int | None = None
    unforeseen: bool = False


def failure_of(error: BaseException) -> Failure:
    """What to note of a cell in which this was raised.

    Raises:
        RunError: the error itself, where it is no cell's fault.
    """
    if isinstance(error, RunError):
        raise error
    if isinstance(error, DivergedError):
        return Failure(str(error), str(error), error.iteration)
    if isinstance(error, CellError | BenchError):
        return Failure(str(error), str(error))
    line = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    line = f"{line} ({place_of(error)})"
    return Failure(line, "".join(traceback.format_exception(error)), unforeseen=True)


def place_of(error: BaseException) -> str:
    """Where something was raised, ``mine.py:12``: in a plug-in, if that had a part in it, else in
    what is not an installed package."""
    walked = traceback.walk_tb(error.__traceback__)
    frames = [(f.f_globals.get("__name__", ""), f.f_code.co_filename, line) for f, line in walked]
    mine = [frame for frame in frames if frame[0].startswith(PLUGIN)]
    not_installed = [frame for frame in frames if "site-packages" not in frame[1]]
    _, path, line = (mine or not_installed or frames)[-1]
    return f"{Path(path).name}:{line}"


def lost(row: pd.Series[Any]) -> str:
    """How many seeds of a row of the leaderboard came to nothing: ``1 diverged, 2 failed``."""
    counts = {"diverged": row["diverged"], "failed": row["failed"] - row["diverged"]}
    return ", ".join(f"{count} {status}" for status, count in counts.items() if count)


def scoreless(row: pd.Series[Any]) -> str:
    """What to show for the score of a row of the leaderboard that has none."""
    return "diverged" if row["diverged"] == row["failed"] else "failed"
