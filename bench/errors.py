"""What ends a command with one line and a status of its own."""

from __future__ import annotations

UNPRINTABLE = "\N{REPLACEMENT CHARACTER}"


class BenchError(ValueError):
    """What was asked cannot be done as asked; one line that says what is wrong and what would be
    right. Ends a command with exit status 2."""


class CellError(RuntimeError):
    """A cell that could not be brought to its end, such as one whose loss is no longer finite. It
    is recorded as failed with this reason, and the other cells go on."""


class DivergedError(CellError):
    """A meta-training whose loss is no longer finite; it stops there.

    Attributes:
        iteration: the one, from 1, after which it was so.
    """

    def __init__(self, what: str, iteration: int) -> None:
        super().__init__(what, iteration)
        self.iteration = iteration

    def __str__(self) -> str:
        return f"diverged: {self.args[0]} at iteration {self.iteration}"


class RunError(Exception):
    """What ends a run and is no cell's fault: exit status 1 and one line; what is complete stays,
    and no cell is noted as failed."""


class SourceChangedError(RunError):
    """The source on the disk is no longer what a run began with: nothing more could be made or
    measured that would be its own."""

    def __str__(self) -> str:
        return (
            "the source code has changed since this run began; go on with the source as it was, or "
            "with another --out"
        )


class StorageError(RunError, OSError):
    """A result that could not be written, as on a full disk: no other cell could be kept either."""

    def __str__(self) -> str:
        return (
            f"cannot write {self.filename}: {self.strerror}; once that is mended, the same command "
            "goes on from here"
        )


class DamagedError(ValueError):
    """A file of a run that is not as it was written; the message says which, and what is wrong."""


def printable(text: str) -> str:
    """Text from outside as one line that cannot steer a terminal."""
    line = " ".join(text.split())
    if line.isprintable():  # as nearly all are, and there are thousands
        return line
    return "".join(letter if letter.isprintable() else UNPRINTABLE for letter in line)
