"""What ends a command with one line and a status of its own."""

from __future__ import annotations

UNPRINTABLE = "\N{REPLACEMENT CHARACTER}"


class BenchError(ValueError):
    """What was asked cannot be done as asked; one line that says what is wrong and what would be
    right. Ends a command with exit status 2."""


class CellError(RuntimeError):
    """A cell that could not be brought to its end, such as one whose loss is no longer finite. It
    is recorded as failed with this reason, and the other cells go on."""


def printable(text: str) -> str:
    """Text from outside as one line that cannot steer a terminal."""
    line = " ".join(text.split())
    return "".join(letter if letter.isprintable() else UNPRINTABLE for letter in line)
