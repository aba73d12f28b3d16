"""One subject in a process of its own: answers questions that come pickled on its standard input.

    python -m tests.performance.peers.serve SUBJECT THREADS

Each answer is ``("done", what was asked for)`` or ``("failed", why)``, pickled.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import pickle
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from tests.performance.peers.work import Arrays, Work

SUBJECTS = {
    "batched": "engines",
    "higher": "engines",
    "autograd loop": "autograd_loop",
    "learn2learn": "with_learn2learn",
    "TorchOpt": "with_torchopt",
    "JAX": "with_jax",
}
"""Every subject, and the module here that is it."""
THEIRS = {"TorchOpt": "torchopt", "learn2learn": "learn2learn", "JAX": "jax"}
"""The packages of subjects that are not this project's, nor plain torch."""


class Server:
    """What a subject can be asked; ``key`` tells apart the works it was given."""

    def __init__(self, subject: str) -> None:
        module = importlib.import_module(f"tests.performance.peers.{SUBJECTS[subject]}")
        self.prepare: Callable[[Work], Callable[[], Any]] = module.prepare
        if SUBJECTS[subject] == "engines":
            self.prepare = partial(module.prepare, engine=subject)
        self.steps: dict[str, Callable[[], Any]] = {}
        self.package = THEIRS.get(subject, "torch")

    def version(self) -> str:
        """That of the subject's package."""
        try:
            return version(self.package)
        except PackageNotFoundError:  # it was put there without pip
            return str(importlib.import_module(f"{self.package}._version").__version__)

    def load(self, key: str, work: Work) -> float:
        """Make ready for some work (JAX compiles here); the seconds it took."""
        began = time.perf_counter()
        self.steps[key] = self.prepare(work)
        self.level = settled()
        return time.perf_counter() - began

    def answer(self, key: str) -> Arrays:
        """Do the work; what came of it."""
        found = self.steps[key]()
        return {name: np.array(detached(value)) for name, value in found.items()}

    def once(self, key: str) -> float:
        """Do the work; the seconds it took."""
        began = time.perf_counter()
        self.steps[key]()
        return time.perf_counter() - began

    def memory(self, key: str) -> dict[str, int] | None:
        """Do the work; in bytes, how far the resident set rose meanwhile (``peak_bytes``), and how
        far it was before above its level after :meth:`load`: what earlier times left
        (``held_bytes``). Linux alone can tell: elsewhere None."""
        before = settled()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is the present level
        except OSError:
            return None
        self.steps[key]()
        peak = resident("VmHWM:") - before
        return {"peak_bytes": max(peak, 0), "held_bytes": max(before - self.level, 0)}


def settled() -> int:
    """The resident set, in bytes, once what was freed is given back to the system."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident()


def detached(value: Any) -> Any:
    """A tensor or another array as numpy takes it."""
    return value.detach().numpy() if hasattr(value, "detach") else value


def resident(which: str = "VmRSS:") -> int:
    """The resident set, or with ``VmHWM:`` its peak, in bytes; 0 where there is no /proc."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(which):
                return int(line.split()[1]) * 1024
    return 0


def main(subject: str, threads: int) -> None:
    """Answer until the other side hangs up."""
    if hasattr(os, "sched_setaffinity"):  # libraries that look for cores find no more
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever libraries print is no answer
    server: Server | None = None
    while True:
        try:
            name, *arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            server = server or Server(subject)
            reply: tuple[str, Any] = ("done", getattr(server, name)(*arguments))
        except Exception as error:
            reply = ("failed", f"{type(error).__name__}: {error}")
        pickle.dump(reply, answers)
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
