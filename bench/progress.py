"""What a person sees while a sweep runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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

from bench.naming import names
from bench.store import Record
from bench.summary import unit_score
from bench.sweep import Cell
from bench.training import Iteration

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
        self.explained: set[tuple[str, str]] = set()
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

    def iteration(self, progress: Iteration) -> None:
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
        figures, name = record.figures, self.names[record.cell.id]
        self.console.print(
            f"{name}: {unit_score(figures)}, trained in {figures['train_seconds']:.0f} s"
        )
        reason = figures.get("engine_reason", "")
        if reason and (record.cell.algorithm, reason) not in self.explained:
            self.explained.add((record.cell.algorithm, reason))
            self.console.print(f"{name} ran by engine {figures['engine']}: {escape(reason)}")

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
