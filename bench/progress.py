"""What a person sees while a sweep runs, and the table at its end."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from bench.store import Record
from bench.sweep import Cell, names
from bench.training import Progress as TrainingProgress

LINE_SECONDS = 30.0
"""How often a console that cannot redraw (a log file) is given a line."""


@dataclass
class _Elsewhere:
    """A cell that another process makes."""

    bar: TaskID
    where: str
    far: str = "begun"


class Display:
    """A bar for the sweep and one for the cell in hand; plain lines where output is not a
    terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.sweep = self.bars.add_task("cells", total=None, note="")
        self.work = self.bars.add_task("", total=None, note="", visible=False)
        self.names: dict[str, str] = {}
        self.elsewhere: dict[str, _Elsewhere] = {}
        self.label = ""
        self.last_line = time.monotonic()

    def begin(self, cells: Sequence[Cell], done: int, failed: int = 0) -> None:
        """The sweep starts; so many cells were there already, or had failed before and are let
        be."""
        self.names = names(cells)
        total = len(cells)
        self.bars.update(self.sweep, total=total, completed=done + failed)
        self.bars.start()
        if done:
            self.console.print(f"{done} of {total} cells are done already")
        if failed:
            self.console.print(
                f"{failed} of {total} cells failed before; --retry-failed does them again"
            )

    def damaged(self, reasons: Mapping[str, str]) -> None:
        """Cells were found damaged, and will be made again; by id, why."""
        for cell_id, reason in reasons.items():
            self.console.print(f"{self.names[cell_id]} is damaged ({reason}): it is made again")

    def end(self) -> None:
        """The sweep has ended."""
        self.bars.stop()

    def training(self, cell: Cell) -> None:
        """A cell starts to be trained."""
        self._work(self.names[cell.id], cell.iterations)

    def iteration(self, progress: TrainingProgress) -> None:
        """A meta-step is done."""
        note = f"loss {progress.loss:.3f}"
        if progress.validation is not None:
            note += f"  validation {progress.validation:.3f}"
        self._advance(progress.iteration, note)

    def evaluating(self, cell: Cell) -> None:
        """A cell starts to be evaluated on the test split."""
        self._work(f"{self.names[cell.id]}: test episodes", cell.episodes)

    def episode(self, done: int) -> None:
        """Test episodes are done."""
        self._advance(done, "")

    def measuring(self, cells: Sequence[Cell]) -> None:
        """Cells start to be measured side by side."""
        self._work(f"measuring {', '.join(cell.algorithm for cell in cells)}", 0)

    def measured(self, done: int, total: int) -> None:
        """Parts of a measurement are done."""
        self.total = total
        self.bars.update(self.work, total=total)
        self._advance(done, "")

    def unmeasured(self, cells: Sequence[Cell]) -> None:
        """Cells cannot be measured here."""
        names = ", ".join(self.names[cell.id] for cell in cells)
        self.console.print(f"not measured, for there is no {cells[0].device} here: {names}")

    def done(self, record: Record) -> None:
        """A cell is complete."""
        self.bars.advance(self.sweep)
        figures = record.figures
        self.console.print(
            f"{self.names[record.cell.id]}: {score(figures)}, "
            f"trained in {figures['train_seconds']:.0f} s"
        )

    def failed(self, cell: Cell, reason: str) -> None:
        """A cell came to nothing."""
        self.bars.advance(self.sweep)
        self.console.print(f"[red]{self.names[cell.id]} failed:[/red] {escape(reason)}")

    # Cells that other processes make, several at a time.

    def began(self, cell: Cell, where: str) -> None:
        """A cell is being made, somewhere."""
        self.left(cell)
        bar = self.bars.add_task(f"{self.names[cell.id]} on {where}", total=None, note="")
        self.elsewhere[cell.id] = _Elsewhere(bar, where)

    def moved(self, cell: Cell, stage: str, done: int, total: int, note: str) -> None:
        """A cell is so far in one of its stages."""
        if (one := self.elsewhere.get(cell.id)) is None:
            return
        one.far = f"{stage} {done}/{total}"
        self.bars.update(one.bar, completed=done, total=total, note=f"{stage}  {note}")
        if self._line_is_due():
            for cell_id, other in self.elsewhere.items():
                self.console.print(f"{self.names[cell_id]} on {other.where}: {other.far}")

    def left(self, cell: Cell) -> None:
        """A cell is no longer being made."""
        if (one := self.elsewhere.pop(cell.id, None)) is not None:
            self.bars.remove_task(one.bar)

    def lost(self, cell: Cell, how: str) -> None:
        """The process that made a cell is gone, and another goes on with it."""
        self.console.print(f"{self.names[cell.id]} goes on from its checkpoint: {escape(how)}")

    def _line_is_due(self) -> bool:
        now = time.monotonic()
        due = not self.console.is_terminal and now - self.last_line > LINE_SECONDS
        if due:
            self.last_line = now
        return due

    def _work(self, label: str, total: int) -> None:
        self.label, self.total = label, total
        self.bars.reset(self.work, description=label, total=total, note="", visible=True)

    def _advance(self, completed: int, note: str) -> None:
        self.bars.update(self.work, completed=completed, note=note)
        if self._line_is_due():
            self.console.print(f"{self.label} {completed}/{self.total} {note}")


SETTINGS = (
    *("seed", "test_shots", "train_shots", "inner_steps", "eval_steps", "meta_batch"),
    *("iterations", "episodes", "protocol", "norm", "engine", "precision"),
    *("device", "source"),
)
"""What changes the meaning of a score: shown for each row where it varies, else below."""
SHARED = ("seed", "test_shots", "iterations", "episodes", "norm", "engine", "device")
"""Of those that do not vary, the ones that are said; the precision is where it is not float32."""


def score(row: pd.Series | dict[str, object]) -> str:
    """Mean and half-width of an interval, accuracy in per cent."""
    mean, half = float(row["mean"]), float(row["ci95"])  # type: ignore[arg-type]
    digits = decimals(str(row["metric"]), mean, half)
    if row["metric"] == "accuracy":
        return f"{100 * mean:.{digits}f} ± {100 * half:.{digits}f}%"
    return f"{row['metric']} {mean:.{digits}f} ± {half:.{digits}f}"


def summary_table(summary: pd.DataFrame, swept: Sequence[str] = ()) -> Table:
    """The summary for a terminal: the settings that all cells share stand below it.

    Args:
        summary: its rows.
        swept: settings that tell rows of one algorithm apart, to be shown besides the usual.
    """
    settings = [name for name in dict.fromkeys([*SETTINGS, *swept]) if name in summary]
    # What failed has the settings that it was asked for, such as an engine by rule; the others
    # have those that ran.
    complete = summary["status"] == "complete"
    told = summary[complete] if complete.any() else summary
    varying = [name for name in settings if _varies(name, told)]
    rounded = "precision" in told and (told["precision"].dropna() != "float32").any()
    shared = [
        f"{name.replace('_', ' ')} {told[name].iloc[0]}"
        for name in (*SHARED, *(["precision"] if rounded else []), *swept)
        if told[name].nunique(dropna=False) == 1 and told[name].notna().all()
    ]
    notes = ["times: median of the repeats (interquartile range)"]
    notes += [f"all: {', '.join(shared)}"] if shared else []
    table = Table(
        title="± is the 95% interval over test episodes: this trained model on new tasks",
        caption="\n".join(notes),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
        caption_justify="left",
    )
    table.add_column("algorithm", no_wrap=True)
    table.add_column("episodes of", no_wrap=True)
    for head in (*varying, "score", "meta-step_ms", "episode_ms", "peak_MiB"):
        fixed = not head.endswith("_ms")  # a spread may stand below its median
        table.add_column(head.replace("_", "\n"), justify="right", no_wrap=fixed, overflow="fold")
    for _, row in summary.sort_values(["dataset", "ways", "shots"], kind="stable").iterrows():
        complete = row["status"] == "complete"
        peak = row["peak_memory_bytes"]
        table.add_row(
            row["algorithm"],
            f"{row['dataset']} {row['ways']}w{row['shots']}s",
            *("" if pd.isna(row[name]) else str(row[name]) for name in varying),
            score(row) if complete else f"[red]{came_to_nothing(row)}[/red]",
            milliseconds(row["step_ms"], row["step_ms_iqr"]),
            milliseconds(row["eval_ms_per_episode"], row["eval_ms_per_episode_iqr"]),
            "" if pd.isna(peak) else f"{peak / 2**20:.0f}",
        )
    return table


def _varies(name: str, summary: pd.DataFrame) -> bool:
    """Whether rows differ in a setting; training with the shots of the test is the same for all,
    whatever their number."""
    if name == "train_shots" and (summary["train_shots"] == summary["shots"]).all():
        return False
    return bool(summary[name].nunique(dropna=False) > 1)


def came_to_nothing(row: pd.Series | dict[str, object]) -> str:
    """What to show for the score of a cell that has none."""
    if row["status"] == "diverged":
        return f"diverged at {row['diverged_at']:.0f}"
    return str(row["status"])


def reuse_notes(summary: pd.DataFrame) -> list[str]:
    """A warning for each dataset whose test samples the episodes share."""
    notes = []
    reused = summary[(summary["sample_reuse"] > 1) & (summary["status"] == "complete")]
    for dataset, rows in reused.groupby("dataset"):
        wider = rows.get("ci95_classes", pd.Series(dtype=float)).dropna()
        about = (
            f" (± {100 * wider.min():.1f} to {100 * wider.max():.1f}%: ci95_classes)"
            if len(wider)
            else ""
        )
        most = rows.sort_values("sample_reuse").iloc[-1]
        notes.append(
            f"note:  {most['episodes']} episodes use each of {dataset}'s test samples "
            f"{most['sample_reuse']:.1f} times, so that these intervals understate the "
            f"uncertainty about new classes{about}; --protocol disjoint shares none"
        )
    return notes


PUBLISHED = {"people": 4.5, "BPL": 3.3, "siamese network": 8.0, "convolutional network": 13.5}
"""Errors in the one-shot challenge, %, as Lake et al. 2015 give them; recalled, not yet checked
against the paper."""


def challenge_notes(summary: pd.DataFrame) -> list[str]:
    """Errors in Omniglot's one-shot challenge, ours beside the published ones."""
    ours = summary[(summary["protocol"] == "lake") & (summary["status"] == "complete")]
    if ours.empty:
        return []
    errors = ", ".join(
        f"{row['algorithm']} {100 * (1 - row['mean']):.1f} ± {100 * row['ci95']:.1f}% "
        f"(seed {row['seed']}, norm {'none' if pd.isna(row['norm']) else row['norm']})"
        for _, row in ours.iterrows()
    )
    published = ", ".join(f"{name} {error}%" for name, error in PUBLISHED.items())
    note = (
        f"note:  errors over {ours['episodes'].iloc[0]} runs: {errors}; Lake et al. 2015 "
        f"(recalled): {published}"
    )
    if (ours["norm"] == "transductive").any():
        note += "; they classify one drawing at a time, which norm transductive does not"
    return [note]


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
