"""Where a run stands: what is done, failed, running and left, and when it will end. Reads only.

The folder may be in use: cells are complete or absent, and what is being made lies in workplaces
(``cells/.<id>``), of which the checkpoint tells how far it is.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors import SafetensorError, safe_open

from algorithms import AlgorithmError
from bench.errors import BenchError
from bench.making import STATE
from bench.measure import seconds_to_measure
from bench.naming import names
from bench.store import CHECKPOINT, RECORD, TRAINED, Record, Run
from bench.sweep import Cell, Sweep, read_sweep
from bench.training import evaluated
from datasets import DatasetError

COMPLETE, FAILED, RUNNING, STOPPED = 0, 1, 3, 4
"""Exit statuses; 2 is bad input."""
FEWEST = 3
"""Cells that must have been finished since the run was started, before their pace is believed."""
MOST_NAMED = 20
"""Cells that are named under a heading; thousands may have failed alike."""


@dataclass(frozen=True)
class Holder:
    """A process that is using a run's folder; None for what the system does not tell."""

    pid: int | None = None
    since: float | None = None


@dataclass(frozen=True)
class Underway:
    """A cell that is being made, or was when its run was stopped.

    Attributes:
        id: the cell's.
        over: how many of its three parts are: training, testing, measuring.
        iteration: of training, at its last checkpoint; 0 where there is none.
        age: seconds since that was written; None where there is none.
    """

    id: str
    over: int
    iteration: int
    age: float | None


@dataclass(frozen=True)
class Status:
    """Where a run stands.

    Attributes:
        holder: the process that is using the folder, if one is.
        asked: the cells that the sweep asks for; None where they cannot be told.
        grid: how many points its axes span, which is no fewer.
        done: the complete cells.
        failed: why cells failed, by their ids.
        underway: the cells in workplaces that are neither complete nor failed.
        others: how many more workplaces there are, of cells that the sweep does not ask for.
        damaged: folders of cells that cannot be read.
        ends: seconds until the run ends; None where nothing tells.
        because: what that comes from, or why there is none.
        called: what cells are called, by their ids.
    """

    folder: Path
    holder: Holder | None
    asked: list[Cell] | None
    grid: int
    done: list[Record]
    failed: dict[str, str]
    underway: list[Underway]
    others: int
    damaged: list[str]
    ends: float | None
    because: str
    called: Mapping[str, str]

    @property
    def wanted(self) -> list[Record]:
        """The complete cells that the sweep asks for."""
        if self.asked is None:
            return self.done
        asked = {cell.id for cell in self.asked}
        return [record for record in self.done if record.cell.id in asked]

    @property
    def left(self) -> int:
        """How many cells are neither done, failed nor underway; at most, where `asked` is None."""
        touched = {*self.failed, *(one.id for one in self.underway)}
        if self.asked is None:
            return max(self.grid - len(self.done) - len(touched), 0)
        touched |= {record.cell.id for record in self.done}
        return sum(cell.id not in touched for cell in self.asked)

    @property
    def exit_status(self) -> int:
        """One of :data:`COMPLETE`, :data:`FAILED`, :data:`RUNNING` and :data:`STOPPED`."""
        if self.holder is not None:
            return RUNNING
        if self.left or self.underway:
            return STOPPED
        return FAILED if self.failed else COMPLETE

    def lines(self) -> Iterator[str]:
        """The status for a terminal."""
        most = "" if self.asked is not None else "at most "
        total = self.grid if self.asked is None else len(self.asked)
        yield f"{self.folder}: {self._state()}"
        also = _unasked(len(self.done) - len(self.wanted))
        yield f"done       {len(self.wanted)} of {most}{total}{also}"
        yield f"failed     {len(self.failed)}"
        yield from self._named((id, reason) for id, reason in self.failed.items())
        also = _unasked(self.others)
        yield f"{'running  ' if self.holder else 'half done'}  {len(self.underway)}{also}"
        yield from self._named((one.id, self._progress(one)) for one in self.underway)
        yield f"left       {most}{self.left}"
        if self.damaged:
            yield f"damaged    {len(self.damaged)}; the same 'run' makes them again"
            yield from _few([f"cells/{name}" for name in self.damaged])
        if self.left or self.underway:
            yield f"ends       {self._end()}"

    def _state(self) -> str:
        if self.holder is None:
            unfinished = "stopped; the same 'run' goes on" if self.left or self.underway else "over"
            return f"no process holds it: {unfinished}"
        who = "a process" if self.holder.pid is None else f"process {self.holder.pid}"
        since = self.holder.since
        return f"{who} holds it" + ("" if since is None else f", since {_moment(since)}")

    def _named(self, said: Iterable[tuple[str, str]]) -> Iterator[str]:
        """What is said of cells, under a heading."""
        return _few([f"{self.called.get(id, f'cell {id}')}: {text}" for id, text in said])

    def _progress(self, one: Underway) -> str:
        if one.over == 2:
            return "trained and tested; measured once those that it is compared with are"
        if one.over == 1:
            return "trained; being tested"
        if one.age is None:
            return "begun; no checkpoint yet"
        cells = {cell.id: cell.iterations for cell in self.asked or []}
        total = f" of {cells[one.id]}" if one.id in cells else ""
        return f"iteration {one.iteration}{total}; its checkpoint is {_duration(one.age)} old"

    def _end(self) -> str:
        if self.ends is None:
            return f"unknown: {self.because}"
        if self.holder is None:
            return f"about {_duration(self.ends)} after it goes on: {self.because}"
        when = _moment(time.time() + self.ends)
        return f"about {when}, in {_duration(self.ends)}: {self.because}"


def _unasked(count: int) -> str:
    return f"; {count} more, which the sweep does not ask for" if count else ""


def _few(lines: Sequence[str]) -> Iterator[str]:
    yield from (f"  {line}" for line in lines[:MOST_NAMED])
    if len(lines) > MOST_NAMED:
        yield f"  and {len(lines) - MOST_NAMED} more"


def read(folder: Path) -> Status:
    """Where the run in a folder stands, running or not.

    Plug-ins are code, and not run: cells of one that is not loaded cannot be told one by one.

    Raises:
        BenchError: there is no run in the folder, or its ``sweep.toml`` cannot be read.
    """
    run = Run(folder)
    if not run.cells.is_dir():
        raise BenchError(f"there is no run in {folder}: it has no cells/{_runs_inside(folder)}")
    sweep = read_sweep(folder / "sweep.toml", {})
    underway = [_underway(path) for path in sorted(run.cells.glob(".*")) if path.is_dir()]
    there = run.cell_ids()
    done = run.records()  # after these two: what was underway may have become complete meanwhile
    complete = {record.cell.id for record in done}
    underway = [one for one in underway if one.id not in complete]
    try:
        asked = sweep.cells()
    except (AlgorithmError, DatasetError, BenchError):
        asked = None
    failures = {id: f for id, f in run.failures().items() if id not in complete}
    failed = {id: _first_line(failure["reason"]) for id, failure in failures.items()}
    begun = [one for one in underway if one.id not in failed]
    wanted = {one.id for one in begun} if asked is None else {cell.id for cell in asked}
    underway = [one for one in begun if one.id in wanted]
    cells = {cell.id: cell for cell in [*(asked or []), *(record.cell for record in done)]}
    cells |= {id: Cell(**failure["settings"]) for id, failure in failures.items()}
    touched = {*complete, *failed}
    left = None if asked is None else [cell for cell in asked if cell.id not in touched]
    ends, because = estimate(run, done, left, underway)
    return Status(
        folder,
        holder(folder / ".lock"),
        asked,
        _grid(sweep),
        done,
        failed,
        underway,
        len(begun) - len(underway),
        [id for id in there if id not in complete],
        ends,
        because,
        names(cells.values()),
    )


def _runs_inside(folder: Path) -> str:
    """Where to look instead: a recipe's folder holds several runs."""
    inside = [path.parent.name for path in sorted(folder.glob("*/sweep.toml"))]
    return f"; there are runs in it: {', '.join(inside)}" if inside else ""


def _grid(sweep: Sweep) -> int:
    axes: list[list[Any]] = [sweep.datasets, sweep.ways, sweep.shots, sweep.seeds, sweep.devices]
    return math.prod(len(axis) for axis in (*axes, sweep.algos, *sweep.set.values()))


def _first_line(reason: str) -> str:
    """A reason in one line; of a traceback the last, which says what was raised."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()] or ["no reason noted"]
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]


# What is running


def holder(lock: Path) -> Holder | None:
    """The process that holds a run's lock; None where none does.

    Linux lists locks and their holders. It does not list those of another machine or container,
    which a shared lock, asked for and let go of at once, would have to wait for.
    """
    try:
        with lock.open("rb") as file:
            pid = _locker(os.fstat(file.fileno()).st_ino)
            if pid is not None:
                return Holder(pid, _started(pid))
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return Holder()
            return None
    except OSError:
        return None


def _locker(inode: int) -> int | None:
    """The process that Linux lists as the holder of a lock on a file."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/locks").read_text().splitlines():
            _, kind, _, mode, pid, place, *_ = line.split()
            if (kind, mode) == ("FLOCK", "WRITE") and int(place.split(":")[2]) == inode:
                return int(pid) if int(pid) > 0 else None
    return None


def _started(pid: int) -> float | None:
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def _underway(workplace: Path) -> Underway:
    """How far a cell is, by what there is in its workplace."""
    over = 2 if (workplace / TRAINED).exists() else (workplace / CHECKPOINT).exists()
    checkpoint = workplace / STATE
    try:
        age = max(time.time() - checkpoint.stat().st_mtime, 0.0)
        with safe_open(checkpoint, framework="numpy") as file:
            iteration = int(file.get_slice("log/loss").get_shape()[0])
    except (OSError, SafetensorError):
        return Underway(workplace.name[1:], int(over), 0, None)
    return Underway(workplace.name[1:], int(over), iteration, age)


# When it ends


def costs(record: Record) -> tuple[float, float, float] | None:
    """Seconds that a cell took for training, testing (with validation) and measuring, as its
    figures tell; None where these were not measured."""
    cell, figures = record.cell, record.figures
    try:
        train, step = float(figures["train_seconds"]), float(figures["step_ms"]) / 1e3
        episode = float(figures["eval_ms_per_episode"]) / 1e3
    except (KeyError, TypeError):
        return None
    return train, episode * evaluated(cell), seconds_to_measure(step, episode)


def kind(cell: Cell) -> str:
    """What a cell's cost depends on: all its settings but seeds and step sizes."""
    settings = cell.model_dump(exclude={"seed", "eval_seed", "meta_lr", "meta_clip"})
    own = {n: v for n, v in cell.hyperparameters.items() if not isinstance(v, float)}
    return json.dumps(settings | {"hyperparameters": own}, sort_keys=True)


def estimate(
    run: Run, done: Sequence[Record], left: Sequence[Cell] | None, underway: Sequence[Underway]
) -> tuple[float | None, str]:
    """Seconds until the run ends, from finished cells of like kind, and what that comes from.

    What cells cost by their own figures leaves out what goes on around them, and how many are made
    at a time. Both are in the pace: the wall time from the start of the run to the last cell that
    was completed since, over the cost of those cells.

    Args:
        run: the run.
        done: its complete cells.
        left: the cells to come, those underway among them; None where they cannot be told.
        underway: how far those are.

    Returns:
        None with the reason, where anything that it would stand on is not known.
    """
    if left is None:
        return None, "the sweep is of a plug-in, which status does not run; --plugin FILE does"
    known: dict[str, list[tuple[float, float, float]]] = {}
    seconds: dict[str, float] = {}
    for record in done:
        if (cost := costs(record)) is not None:
            known.setdefault(kind(record.cell), []).append(cost)
            seconds[record.cell.id] = sum(cost)
    strange = sum(kind(cell) not in known for cell in left)
    if strange:
        return None, f"no finished cell is like {strange} of those to come"
    try:
        began = (run.folder / "environment.json").stat().st_mtime
        took = {id: (run.cells / id / RECORD).stat().st_mtime - began for id in seconds}
    except OSError:
        return None, "it cannot be told when the run was started"
    fresh = {id: seconds[id] for id, since in took.items() if since > 0}
    if len(fresh) < FEWEST:
        return None, f"fewer than {FEWEST} cells were finished since the run was started"
    passed = max(took[id] for id in fresh)
    if passed < sum(fresh.values()) / (os.cpu_count() or 1):
        return None, "the files' times are not those of the run; was the folder copied?"
    # A cell that went on from an earlier start has not cost all of that since this one.
    pace = passed / sum(min(cost, took[id]) for id, cost in fresh.items())
    typical = {name: np.median(rows, axis=0) for name, rows in known.items()}
    work = sum(float(typical[kind(cell)].sum()) for cell in left)
    cells = {cell.id: cell for cell in left}
    for one in underway:
        if (cell := cells.get(one.id)) is not None:
            parts = typical[kind(cell)]
            share = one.iteration / cell.iterations if one.over == 0 else 0.0
            work -= float(parts[: one.over].sum() + share * parts[0])
    alike = sum(len(known[name]) for name in {kind(cell) for cell in left})
    cells_alike = f"{alike} finished cell{'s' if alike > 1 else ''} of like kind"
    return pace * work, f"from {cells_alike}, at the pace since {_moment(began)}"


# For people


def _moment(when: float) -> str:
    """A time of day, with the date where that is another one."""
    moment, today = datetime.fromtimestamp(when), datetime.now().date()
    return moment.strftime("%H:%M" if moment.date() == today else "%Y-%m-%d %H:%M")


def _duration(seconds: float) -> str:
    """A time span in its two largest units."""
    whole = timedelta(seconds=round(seconds))
    hours, rest = divmod(whole.seconds, 3600)
    minutes, left = divmod(rest, 60)
    parts = {"d": whole.days, "h": hours, "min": minutes, "s": left}
    told = [f"{count} {unit}" for unit, count in parts.items() if count]
    return " ".join(told[:2]) or "0 s"
