"""Ctrl-C and SIGTERM: a question that work asks itself, and nothing to the processes it starts."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Interrupted:
    """Whether Ctrl-C or a termination was asked for; work stops at the next safe point."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        return self.asked


@contextmanager
def interruptible() -> Iterator[Interrupted]:
    """Turn the first Ctrl-C (or SIGTERM) into a question that the work asks itself; a second one
    stops at once."""
    interrupted = Interrupted()

    def note(number: int, frame: FrameType | None) -> None:
        if interrupted.asked:
            raise KeyboardInterrupt
        interrupted.asked = True

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
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
