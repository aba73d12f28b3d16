"""Numbers as people read them: how many digits, which unit, what stands for nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

OVERS = {
    "seeds": "over seeds (the algorithm, trained again, on these test episodes)",
    "episodes": "over test episodes (this trained model on new tasks)",
}
"""What an interval speaks of."""


def score(row: pd.Series[Any] | Mapping[str, Any], half: str = "ci95") -> str:
    """Mean and half width of an interval, accuracies in per cent: ``81.3 ± 0.7%``, ``0.59 ± 0.1``.

    Args:
        row: has ``metric`` and ``mean``.
        half: the column of the half width, which may be NaN.
    """
    scale, unit = (100, "%") if row["metric"] == "accuracy" else (1, "")
    digits = decimals(row["metric"], row["mean"], row[half])
    width = "" if pd.isna(row[half]) else f" ± {scale * row[half]:.{digits}f}"
    return f"{scale * row['mean']:.{digits}f}{width}{unit}"


def plain(value: Any, none: str = "-") -> str:
    """A setting's value, and a word where there is none; a column with holes has no whole numbers,
    and they are whole again."""
    if value is None or value is pd.NA or value != value:
        return none
    return f"{value:g}" if isinstance(value, float) else str(value)


def counted(count: int, noun: str) -> str:
    """``1 cell``, ``2 cells``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def decimals(metric: str, *values: float) -> int:
    """Decimals to write scores with, the last of which is half of an interval: of accuracies, in
    per cent, one, or as many as show a digit of that; of an error three, or as many as show two
    digits of each of the values."""
    if metric == "accuracy":
        return digits_of(100 * values[-1], 1, shown=1)
    return max(digits_of(value, 3) for value in values)


def digits_of(value: float, least: int, shown: int = 2) -> int:
    """Decimals to write a number with: ``least``, or as many as show so many of its digits."""
    if not value or not math.isfinite(value):
        return least
    return min(max(least, shown - 1 - math.floor(math.log10(abs(value)))), 15)


def milliseconds(value: float, spread: float) -> str:
    """A time with its spread, to three digits of it: ``69.3 (4.1)``; nothing for what was not
    measured."""
    if pd.isna(value):
        return ""
    digits = min(digits_of(value, 0, shown=3), 2) if value > 0 else 2
    return f"{value:.{digits}f}" + ("" if pd.isna(spread) else f" ({spread:.{digits}f})")
