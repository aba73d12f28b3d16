"""Ctrl-C and SIGTERM: a question that work asks itself, and nothing to the processes it starts."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM)
STDERR = 2
HEARD = b"\nstopping at the next safe point; once more stops at once\n"


class Interrupted:
    """Whether Ctrl-C or a termination was asked for; work stops at the next safe point."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        return self.asked


@contextmanager
def interruptible(silent: bool = False) -> Iterator[Interrupted]:
    """Turn the first Ctrl-C (or SIGTERM) into a question that the work asks itself, and say on
    stderr that it was heard unless ``silent``; a second one stops at once."""
    interrupted = Interrupted()

    def note(number: int, frame: FrameType | None) -> None:
        if interrupted.asked:
            raise KeyboardInterrupt
        interrupted.asked = True
        if not silent:
            # Past Python's files, one of which the interrupted code may be writing to just now.
            with suppress(OSError):
                os.write(STDERR, HEARD)

    before = {number: signal.signal(number, note) for number in STOPPING}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def unsignalled() -> Iterator[None]:
    """A process that is started within gets neither, from its first moment: a terminal, and many a
    scheduler, sends them to all processes of a run, and they are for the one who asks to deal
    with."""
    # With its first process multiprocessing starts a helper, and lets both through again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
