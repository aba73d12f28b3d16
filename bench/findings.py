"""What a run's tables say, in words and numbers for people: tasks, scores, who leads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bench.comparison import Row
from bench.naming import SETTING
from bench.tables import unlike
from bench.wording import score

MOST_NAMED = 12
"""Entries that a verdict names: a sweep may have hundreds."""


@dataclass(frozen=True)
class Task:
    """What entries are compared on: a dataset, ways, shots and a device.

    Attributes:
        rows: its part of the leaderboard, the entries that have a score.
    """

    index: int
    name: str
    metric: str
    setting: tuple[Any, ...]
    rows: pd.DataFrame

    @property
    def scale(self) -> float:
        """From the metric to what is shown: accuracies are shown in per cent."""
        return 100.0 if self.metric == "accuracy" else 1.0

    @property
    def axis(self) -> str:
        """The metric and its unit."""
        return "accuracy, %" if self.metric == "accuracy" else "mean squared error"

    @property
    def chance(self) -> float | None:
        """What guessing scores, as shown."""
        return 100 / float(self.setting[1]) if self.metric == "accuracy" else None


@dataclass(frozen=True)
class Verdict:
    """Who leads on a task, and from whom that is told apart."""

    task: str
    leader: str
    score: str
    lines: list[str]


def tasks(leaderboard: pd.DataFrame) -> list[Task]:
    """The tasks that have a score, in the leaderboard's order."""
    scored = leaderboard[leaderboard["seeds"] > 0]
    found: list[Task] = []
    for setting, rows in scored.groupby(list(SETTING), sort=False):
        name = task_name(rows.iloc[0], leaderboard)
        found.append(Task(len(found), name, rows["metric"].iloc[0], tuple(setting), rows))
    return found


def task_name(row: pd.Series[Any], leaderboard: pd.DataFrame) -> str:
    """An entry's task; a regression has no ways, and the device is said where there are several."""
    shape = "" if row["metric"] == "mse" else f"{row['ways']}-way "
    device = f" on {row['device']}" if leaderboard["device"].nunique() > 1 else ""
    return f"{row['dataset']}, {shape}{row['shots']}-shot{device}"


def headline(row: pd.Series[Any]) -> str:
    """An entry's score with its interval, and what that speaks of."""
    if row["over"] == "seeds":
        return f"{score(row, 'ci_seeds')} over {row['seeds']} seeds"
    return f"{score(row, 'ci_episodes')} over {int(row['episodes'])} episodes"


def pairs(task: Task, rows: Iterable[Row]) -> list[Row]:
    """The comparisons made on a task."""
    return [row for row in rows if (row.dataset, row.ways, row.shots, row.device) == task.setting]


def level_with_best(task: Task, rows: Iterable[Row]) -> list[str]:
    """The entry with the best mean, and those that were compared with it and that it does not
    beat."""
    best = task.rows["label"].iloc[0]
    return [best, *(other for other, better in _against_best(task, rows) if better != best)]


def _against_best(task: Task, rows: Iterable[Row]) -> list[tuple[str, str]]:
    """What the entry with the best mean was compared with, and who was better, if anyone. It may be
    the other one: a mean is over an entry's own seeds, a comparison over those that both have."""
    best = task.rows["label"].iloc[0]
    return [
        (row.algorithm_b if row.algorithm_a == best else row.algorithm_a, row.better)
        for row in pairs(task, rows)
        if best in (row.algorithm_a, row.algorithm_b)
    ]


def verdict(task: Task, rows: Sequence[Row]) -> Verdict:
    """What a task's entries and their comparisons come to."""
    first = task.rows.iloc[0]
    best = first["label"]
    against = _against_best(task, rows)
    ahead = [other for other, better in against if better == other]
    beaten = [other for other, better in against if better == best]
    level = [other for other, better in against if not better]
    lines = []
    if ahead:
        lines.append(f"Worse than {listed(_few(ahead))} on the seeds that both have.")
    if beaten:
        lines.append(f"Better than {listed(_few(beaten))}.")
    if level:
        lines.append(f"Not told apart from {listed(_few(level))}.")
    for names in unlike(task.rows).values():
        lines.append(f"Unlike settings: {listed(names)} differ.")
    return Verdict(task.name, best, headline(first), lines)


def _few(names: Sequence[str]) -> list[str]:
    """The first of many names, and how many others there are."""
    others = len(names) - MOST_NAMED
    return [*names[:MOST_NAMED], f"{others} others"] if others > 1 else list(names)


def listed(names: Sequence[str]) -> str:
    """Names as a sentence lists them."""
    words = [name.replace("_", " ") for name in names]
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
