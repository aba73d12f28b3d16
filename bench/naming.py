"""What rows, cells and settings are called: what tells each from its namesakes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.sweep import Cell

SETTING = ("dataset", "ways", "shots", "device")
"""What a comparison holds fixed: the task, and the machine that its costs belong to."""
PLACE = ("algorithm", *SETTING)


def varied(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The settings in which rows of one algorithm at one :data:`PLACE` differ, seeds apart: what
    tells them from their namesakes. A row that lacks a setting differs from none in it."""
    firsts: dict[tuple[Any, ...], dict[str, str]] = {}
    found: set[str] = set()
    for row in rows:
        first = firsts.setdefault(tuple(row[name] for name in PLACE), {})
        for name, value in row.items():
            text = said(value)
            if name != "seed" and first.setdefault(name, text) != text:
                found.add(name)
    return sorted(found)


def told_apart(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What tells each row from its namesakes: ``inner_lr 0.1, inner_steps 5``; empty where it has
    none.

    What differs at one place is said at all: a name means one set-up of its algorithm, whatever
    came to nothing elsewhere.
    """
    namesakes: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        namesakes.setdefault((row["algorithm"], row["device"]), []).append(row)
    telling = {who: varied(group) for who, group in namesakes.items()}
    return [
        ", ".join(
            f"{name} {said(row[name])}"
            for name in telling[row["algorithm"], row["device"]]
            if name in row
        )
        for row in rows
    ]


def labelled(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each row's algorithm, with what tells it from its namesakes."""
    return [
        f"{row['algorithm']} ({own})" if own else str(row["algorithm"])
        for row, own in zip(rows, told_apart(rows), strict=True)
    ]


def names(cells: Iterable[Cell]) -> dict[str, str]:
    """A name for each cell, by its id, with what tells it from its namesakes among them, and its
    device where there are several."""
    cells = list(cells)
    owns = told_apart([cell.row() for cell in cells])
    several = len({cell.device for cell in cells}) > 1
    found = {}
    for cell, own in zip(cells, owns, strict=True):
        name = f"{cell} on {cell.device}" if several else str(cell)
        found[cell.id] = f"{name} ({own})" if own else name
    return found


def said(value: Any) -> str:
    """A setting's value for people; that of a table that has none is NaN."""
    if value is None or value != value:
        return "none"
    return str(value)


def in_order(value: Any) -> tuple[int, float, str]:
    """What to sort a setting's values by, numbers before words."""
    number = isinstance(value, int | float)
    return (0, value, "") if number else (1, 0, str(value))
