"""Commands that can be killed, each in a process of its own.

The processes are forked from one that has imported everything, since to import torch takes seconds
and a kill needs a process. They are of one thread, and time is counted as the processor's, so that
what a kill meets does not depend on what else the machine does.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

from bench import measure, plots, runner, training
from bench.cli import main
from bench.store import Run
from tests.bench.conftest import QUICK

PATIENCE_SECONDS = 240.0

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.chaos.attempts"])


def quick() -> None:
    """Let a command write a checkpoint after every iteration, and make up its measurements."""
    training.CHECKPOINT_SECONDS = -1.0
    measure.measure = made_up


def made_up(cells: Sequence[Any], root: Any = None, plugin: Any = None) -> list[pd.DataFrame]:
    """Stands for :func:`bench.measure.measure`, whose processes take seconds to start."""
    columns = {"repeat": 0, "seconds": 0.5, "wall_seconds": 0.5, "process_seconds": 0.5}
    rows = [columns | {"phase": phase, "peak_bytes": 2**20, "flops": 10**9} for phase in PHASES]
    return [pd.DataFrame(rows).assign(session="made up") for _ in cells]


PHASES = measure.PHASES


class Attempt:
    """A command in a process of its own.

    Args:
        arguments: of ``python -m bench``.
        cwd: the folder it runs in; ``out``, ``err`` and ``phase`` are written beside it.
        prepare: is called in the process first, such as :func:`quick`.
    """

    def __init__(self, arguments: Sequence[str], cwd: Path, *prepare: Callable[[], None]) -> None:
        self.printed = {name: cwd.parent / f"{cwd.name}.{name}" for name in ("out", "err")}
        self.noted = cwd.parent / f"{cwd.name}.phase"
        target = (tuple(arguments), cwd, self.printed, self.noted, prepare)
        self.process = _context.Process(target=_command, args=target)
        self.process.start()

    def status(self) -> int:
        """The exit status; negative, the number of the signal that ended it."""
        self.process.join(PATIENCE_SECONDS)
        assert self.process.exitcode is not None, f"still at {self.phase} after all this time"
        return self.process.exitcode

    def kill_after(self, seconds: float) -> bool:
        """Kill it once it has had so much processor time; whether that came before its end."""
        while self.process.is_alive() and self.spent() < seconds:
            time.sleep(0.002)
        self.process.kill()
        return self.status() < 0

    def kill_at(self, phase: str) -> None:
        """Kill it once it has come to a phase."""
        while self.process.is_alive() and self.phase != phase:
            time.sleep(0.002)
        self.process.kill()
        assert self.status() < 0, f"it ended before {phase}"

    def spent(self) -> float:
        """Seconds of processor time so far."""
        try:
            line = Path(f"/proc/{self.process.pid}/schedstat").read_text()
            return int(line.split()[0]) / 1e9
        except (OSError, ValueError, IndexError):
            return float("inf")

    @property
    def phase(self) -> str:
        """What it does, or did last."""
        try:
            return self.noted.read_text().strip()
        except OSError:
            return ""

    @property
    def out(self) -> str:
        return self.printed["out"].read_text()

    @property
    def err(self) -> str:
        return self.printed["err"].read_text()

    def orphans(self) -> list[psutil.Process]:
        """Processes that it started and that outlived it."""
        return [p for p in psutil.process_iter() if _session(p.pid) == self.process.pid]


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid) if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE else None
    except (OSError, psutil.Error):
        return None


def _command(
    arguments: Sequence[str],
    cwd: Path,
    printed: dict[str, Path],
    noted: Path,
    prepare: Sequence[Callable[[], None]],
) -> None:
    os.setsid()  # its processes are known by their session
    for number, path in ((1, printed["out"]), (2, printed["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(cwd)
    for prepared in prepare:
        prepared()
    _note_phases(noted)
    status = main(arguments)
    sys.stdout.flush()
    os._exit(status)


def _note_phases(path: Path) -> None:
    """Have the process write down what it does."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    stack = ["starting"]

    def note() -> None:
        os.pwrite(file, stack[-1].ljust(16).encode(), 0)

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        stack.append(name)
        note()
        yield
        stack.pop()
        note()

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def noted(*arguments: Any, **named: Any) -> Any:
            with phase(name):
                return function(*arguments, **named)

        return noted

    note()
    for place, name, called in (
        (runner, "train", "training"),
        (training, "write_tensors", "checkpoint"),
        (training, "evaluate", "validation"),
        (runner, "evaluate", "evaluation"),
        (measure, "measure", "measuring"),
        (Run, "complete", "completing"),
        (Run, "write_summary", "summary"),
        (plots, "draw_all", "figures"),
    ):
        setattr(place, name, noting(called, getattr(place, name)))


def sweep(out: str, *more: str) -> tuple[str, ...]:
    """The arguments of a sweep of tiny cells."""
    return ("run", *QUICK, *more, "--out", out)


def contents(folder: Path) -> dict[str, Any]:
    """All of a run that may not depend on what happened to it: by cell, every file's bytes, but of
    the tables and figures without times. Checks that it is whole on the way."""
    run = Run(folder)
    found: dict[str, Any] = {}
    assert [path.name for path in run.cells.iterdir() if path.name.startswith(".")] == []
    assert list(folder.rglob("*.part")) == []
    for record in run.records(thorough=True):
        cell = run.cells / record.cell.id
        assert sorted(path.name for path in cell.iterdir()) == FILES
        timeless = {n: v for n, v in record.figures.items() if n not in TIMES}
        log = run.table(record.cell, "training.parquet")
        assert (log["seconds"] >= 0).all()
        found[record.cell.id] = {
            "settings": record.cell.model_dump(),
            "source": record.source,
            "figures": timeless,
            "episodes": (cell / "episodes.parquet").read_bytes(),
            "checkpoint": (cell / "checkpoint.safetensors").read_bytes(),
            "training": log.drop(columns="seconds").to_csv(index=False, float_format="%r"),
        }
    summary = pd.read_csv(folder / "summary.csv")
    assert summary["status"].eq("complete").all()
    assert len(summary) == summary["cell_id"].nunique() == len(run.cell_ids()) == len(found)
    assert not run.failures()
    return found | {"order": summary["cell_id"].tolist()}


FILES = sorted(f"{name}" for name in ("cell.json", "checkpoint.safetensors")) + [
    "episodes.parquet",
    "performance.parquet",
    "training.parquet",
]
TIMES = (
    *("train_seconds", "step_ms", "eval_ms_per_episode", "matmul_share"),
    *("peak_memory_bytes", "step_joules"),
)


def count_operations(place: Path, last: int | None = None) -> Callable[[], None]:
    """What makes a process kill itself at the ``last`` operation on files below a folder; without
    it, to write their number to ``<folder>.operations``."""
    return partial(_count_operations, place, last)


def _count_operations(place: Path, last: int | None) -> None:
    done = 0

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        name = arguments[0]
        if (
            not isinstance(name, (str, os.PathLike))
            or place not in Path(os.path.abspath(name)).parents
        ):
            return
        done += 1
        if done == last:
            os.kill(os.getpid(), 9)
        if last is None:
            os.pwrite(file, str(done).encode(), 0)

    if last is None:
        file = os.open(f"{place}.operations", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.addaudithook(heard)
