"""What a member of a crew does: one cell, trained and evaluated, telling how it gets on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import filelock
import torch

from bench.errors import BenchError, RunError, SourceChangedError
from bench.executors.base import Job, Moved, Outcome
from bench.failures import failure_of
from bench.files import make_folder
from bench.making import Sources, train_and_evaluate
from bench.store import source_hash
from bench.sweep import Cell
from bench.training import Iteration

TELL_SECONDS = 0.5
"""How often, at most, a worker tells how far a cell is."""
ASK_SECONDS = 1.0
"""How often, at most, a worker on a cluster asks whether to stop."""


class Telling:
    """Tells of a cell's progress, not too often."""

    def __init__(self, cell: Cell, tell: Callable[[Moved], None]) -> None:
        self.cell = cell
        self.tell = tell
        self.told = 0.0

    def training(self, cell: Cell) -> None:
        self._tell("training", 0, cell.iterations)

    def iteration(self, progress: Iteration) -> None:
        done, total = progress.iteration, self.cell.iterations
        self._tell("training", done, total, f"loss {progress.loss:.3f}")

    def evaluating(self, cell: Cell) -> None:
        self._tell("test episodes", 0, cell.episodes)

    def episode(self, done: int) -> None:
        self._tell("test episodes", done, self.cell.episodes)

    def _tell(self, stage: str, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if done and now - self.told < TELL_SECONDS:
            return
        self.told = now
        self.tell(Moved(self.cell.id, stage, done, total, note))


def seldom(question: Callable[[], bool]) -> Callable[[], bool]:
    """A question that is put every :data:`ASK_SECONDS`; in between the answer is no."""
    asked = time.monotonic()

    def answer() -> bool:
        nonlocal asked
        if time.monotonic() - asked < ASK_SECONDS:
            return False
        asked = time.monotonic()
        return question()

    return answer


def make(
    job: Job,
    sources: Sources,
    plugin: Path | None,
    threads: int,
    watch: Telling,
    interrupted: Callable[[], bool],
) -> Outcome:
    """Train and evaluate a cell in its workplace, which must be on this machine's disk."""
    try:
        if source_hash(plugin) != job.source:
            raise SourceChangedError
        torch.set_num_threads(threads)
        make_folder(job.workplace)
        return train_and_evaluate(
            job.cell,
            job.workplace,
            sources,
            watch,
            source=job.source,
            verify_gradients=job.verify_gradients,
            interrupted=interrupted,
        )
    except KeyboardInterrupt:
        return None
    except (Exception, SystemExit) as error:
        try:
            return failure_of(error)
        except RunError as end:
            return end


def alone(locks: Path, patience: float, cell: Cell, work: Callable[[], Outcome]) -> Outcome:
    """What the work on a cell comes to where processes share a disk: not while another, which was
    taken for lost or whose run was killed, is still at it.

    Args:
        locks: a folder that gets a lock for each cell.
        patience: seconds to wait for the other; negative for as long as it takes.
        cell: which.
        work: makes it.
    """
    lock = filelock.FileLock(locks / f"{cell.id}.lock", timeout=patience)
    try:
        with lock:
            return work()
    except filelock.Timeout:
        return failure_of(BenchError("another process is still making it"))
