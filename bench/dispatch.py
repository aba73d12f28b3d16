"""Hands cells to a crew, and takes what becomes of each of them, once."""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bench.errors import RunError
from bench.executors.base import Began, Crew, Ended, Job, Kit, Lost, Moved
from bench.failures import Failure
from bench.progress import Display
from bench.sweep import Cell

TRIES = 3
"""How often a cell whose process is lost is begun or gone on with, in all."""
GRACE_SECONDS = 30.0
"""How long interrupted cells may take to write their checkpoints."""
POLL_SECONDS = 0.2


@contextmanager
def employed(crew: Crew, kit: Kit, jobs: Sequence[Job]) -> Iterator[None]:
    """A crew at work, and gone afterwards, however the work ends; none where there is none."""
    if not jobs:
        yield
        return
    try:
        crew.begin(kit)
        yield
    finally:
        crew.end()


@dataclass
class _Running:
    job: Job
    began: float | None = None


def dispatch(
    crew: Crew, jobs: Sequence[Job], display: Display, interrupted: Callable[[], bool]
) -> Iterator[tuple[Cell, dict[str, Any] | Failure]]:
    """Have every job done.

    A cell whose process is lost goes on, in another, from its last checkpoint; the third time, it
    has failed. One that takes too long is ended, and has failed.

    Args:
        crew: is at work.
        jobs: of different cells.
        display: is told what runs where.
        interrupted: asked again and again; True ends in ``KeyboardInterrupt``, once all have
            written their checkpoints.

    Yields:
        Each cell, once, with its figures or the reason why it has none.

    Raises:
        RunError: a worker's disk takes no more, or it finds other source than the run's.
    """
    waiting = deque(jobs)
    running: dict[str, _Running] = {}
    tries: Counter[str] = Counter()
    room = crew.jobs or sys.maxsize
    stop_at: float | None = None
    while waiting or running:
        now = time.monotonic()
        if stop_at is None and interrupted():
            waiting.clear()
            crew.interrupt()
            stop_at = now + GRACE_SECONDS
        if stop_at is not None and now > stop_at:
            break
        batch = [waiting.popleft() for _ in range(min(len(waiting), room - len(running)))]
        if batch:
            running |= {job.cell.id: _Running(job) for job in batch}
            crew.submit(batch)
        for event in crew.events(POLL_SECONDS):
            one = running.get(event.cell_id)
            if one is None:
                continue
            if isinstance(event, Began):
                one.began = one.began or time.monotonic()
                display.began(one.job.cell, event.where)
                continue
            if isinstance(event, Moved):
                display.moved(one.job.cell, event.stage, event.done, event.total, event.note)
                continue
            del running[event.cell_id]
            display.left(one.job.cell)
            outcome = event.outcome if isinstance(event, Ended) else None
            if isinstance(outcome, RunError):
                raise outcome
            if outcome is not None:
                yield one.job.cell, outcome
            elif stop_at is None:
                how = event.how if isinstance(event, Lost) else "it was interrupted"
                tries[event.cell_id] += 1
                if tries[event.cell_id] < TRIES:
                    display.lost(one.job.cell, how)
                    waiting.appendleft(one.job)
                else:
                    line = f"its process was lost {TRIES} times; the last time, {how}"
                    yield one.job.cell, Failure(line, line)
        for one in _overdue(running, crew.cell_timeout):
            del running[one.job.cell.id]
            crew.kill(one.job.cell.id)
            display.left(one.job.cell)
            line = f"it took more than {crew.cell_timeout:g} s (--cell-timeout)"
            yield one.job.cell, Failure(line, line)
    if interrupted():
        raise KeyboardInterrupt


def _overdue(running: dict[str, _Running], limit: float | None) -> list[_Running]:
    if limit is None:
        return []
    now = time.monotonic()
    return [one for one in running.values() if one.began is not None and now - one.began > limit]
