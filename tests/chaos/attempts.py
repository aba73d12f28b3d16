"""Commands that can be killed, each in a process of its own.

The processes are forked from one that has imported everything, since to import torch takes seconds
and a kill needs a process. They are of one thread, and time is counted as the processor's, so that
what a kill meets does not depend on what else the machine does.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
import torch._dynamo  # which the first optimizer imports: another second

from bench import checkpoints, making, measure, plots, runner, store, training
from bench.cli import main
from bench.store import Run
from tests.bench.conftest import QUICK

PATIENCE_SECONDS = 1200.0

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.chaos.attempts"])


def quick() -> None:
    """Let a command write a checkpoint after every iteration, make up its measurements, and look
    neither at what it is asked nor at the machine."""
    checkpoints.SECONDS = -1.0
    measure.measure = made_up
    runner.check = lambda *arguments: None
    store.environment = lambda sweep: {}


def impatient() -> None:
    """Let a command not wait for a folder, which a quick run may leave meanwhile."""
    store.LOOK_SECONDS = 0.0


def made_up(cells: Sequence[Any], root: Any = None, *context: Any) -> list[pd.DataFrame]:
    """Stands for :func:`bench.measure.measure`, whose processes take seconds to start."""
    columns = {"repeat": 0, "seconds": 0.5, "wall_seconds": 0.5, "process_seconds": 0.5}
    rows = [
        columns | {"phase": phase, "peak_bytes": 2**20, "flops": 10**9} for phase in measure.PHASES
    ]
    return [pd.DataFrame(rows).assign(session="made up") for _ in cells]


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
        self.noted.unlink(missing_ok=True)
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
            time.sleep(0.005)
        self.process.kill()
        return self.status() < 0

    def wait_until_stopped(self) -> None:
        """Wait until :func:`signalled` has stopped it."""
        while psutil.Process(self.process.pid).status() != psutil.STATUS_STOPPED:
            assert self.process.is_alive(), self.err
            time.sleep(0.02)

    def spent(self) -> float:
        """Seconds of processor time so far."""
        try:
            line = Path(f"/proc/{self.process.pid}/schedstat").read_text()
            return int(line.split()[0]) / 1e9
        except (OSError, ValueError, IndexError):
            return float("inf")

    @property
    def took(self) -> float:
        """Seconds of processor time of a command that has ended by itself."""
        return float(self.noted.with_suffix(".spent").read_text())

    @property
    def phase(self) -> str:
        """What it does, or did last."""
        try:
            return self.noted.read_text()[:16].strip() or "starting"
        except OSError:
            return "starting"

    @property
    def before_phase(self) -> float:
        """Seconds of processor time before it came to :attr:`phase`."""
        return float(self.noted.read_text()[16:])

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
    torch.set_num_threads(1)
    os.setsid()  # its processes are known by their session
    for number, path in ((1, printed["out"]), (2, printed["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(cwd)
    for prepared in prepare:
        prepared()
    _note_phases(noted)
    status = main(arguments)
    for told in at_end:
        told()
    noted.with_suffix(".spent").write_text(str(time.process_time()))
    sys.stdout.flush()
    os._exit(status)


def at_phase(name: str, act: Callable[[], None]) -> None:
    """Have the process do something whenever it comes to a phase."""
    place, function = PLACES[name]
    plain = getattr(place, function)

    @wraps(plain)
    def acting(*arguments: Any, **named: Any) -> Any:
        act()
        return plain(*arguments, **named)

    setattr(place, function, acting)


def _note_phases(path: Path) -> None:
    """Have the process write down what it does."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def note(name: str) -> None:
        os.pwrite(file, f"{name:16}{time.process_time():16.6f}".encode(), 0)

    note("starting")
    for name in PLACES:
        at_phase(name, partial(note, name))


PLACES: dict[str, tuple[Any, str]] = {
    "reading": (Run, "state"),
    "training": (training._Training, "step"),
    "checkpoint": (training, "write_tensors"),
    "validation": (training, "evaluate"),
    "evaluation": (making, "evaluate"),
    "measuring": (measure, "measure"),
    "completing": (Run, "complete"),
    "summary": (Run, "write_summary"),
    "figures": (plots, "draw_all"),
}


def sweep(out: str, *more: str) -> tuple[str, ...]:
    """The arguments of a sweep of tiny cells."""
    return ("run", *QUICK, "--set", "val_episodes=5", *more, "--out", out)


def contents(folder: Path) -> dict[str, Any]:
    """All of a run that may not depend on what happened to it: by cell, every file's bytes, but of
    the tables and figures without times, nor the commit, which changes with a checkout.
    Checks that it is whole on the way."""
    run = Run(folder)
    found: dict[str, Any] = {}
    assert [path.name for path in run.cells.iterdir() if path.name.startswith(".")] == []
    assert list(folder.rglob("*.part")) == []
    for record in run.records(thorough=True):
        cell = run.cells / record.cell.id
        assert sorted(path.name for path in cell.iterdir()) == FILES
        timeless = {n: v for n, v in record.figures.items() if n not in (*TIMES, "commit")}
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


FILES = sorted((*store.FILES, store.RECORD))
TIMES = (
    *("train_seconds", "step_ms", "eval_ms_per_episode", "matmul_share"),
    *("peak_memory_bytes", "step_joules"),
)


# What may be done to a process, as ``prepare``; each in terms of the run's folder.


def at_operation(number: int, place: Path) -> None:
    """Kill the process at an operation on files below a folder; 0 for none. How many there were is
    in ``<folder>.operations``."""
    file = os.open(f"{place}.operations", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    done = 0

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        if event in OPERATIONS and _below(place, arguments[0]):
            done += 1
            os.pwrite(file, str(done).encode(), 0)
            if done == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(heard)


OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")


def _below(place: Path, name: object) -> bool:
    return isinstance(name, (str, os.PathLike)) and place in (Path.cwd() / name).parents


def signalled(phase: str, number: int) -> None:
    """Send the process a signal once it comes to a phase."""
    at_phase(phase, lambda: os.kill(os.getpid(), number))


def filling(phase: str, disk: Path) -> None:
    """Leave no space on a disk once the process comes to a phase."""
    at_phase(phase, lambda: fill(disk))


def fill(disk: Path) -> None:
    """Leave no space on a disk: the file ``filler`` takes what there is."""
    with suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def setting_the_clock_back() -> None:
    """Set back what Python tells of the time by an hour, each time that it is asked."""
    began, asked = time.time(), itertools.count()
    time.time = lambda: began - 3600 * next(asked)
    time.time_ns = lambda: int(1e9 * time.time())


def watching_for_power_loss(place: Path) -> None:
    """Write to ``<folder>.unsafe`` each rename below a folder of what was not flushed before, or
    into a folder that was not flushed after; and last, how many renames there were."""
    file = os.open(f"{place}.unsafe", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    flushed: dict[int, tuple[int, int]] = {}
    pending: dict[int, Path] = {}
    renames = 0
    plain_fsync = os.fsync

    def state(status: os.stat_result) -> tuple[int, int]:
        return status.st_size, status.st_mtime_ns

    def fsync(number: int) -> None:
        plain_fsync(number)
        status = os.fstat(number)
        flushed[status.st_ino] = state(status)
        pending.pop(status.st_ino, None)

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal renames
        if event != "os.rename" or not _below(place, arguments[1]):
            return
        renames += 1
        source, target = (Path.cwd() / name for name in arguments[:2])
        for path in [source, *source.glob("*")]:
            if flushed.get(path.stat().st_ino) != state(path.stat()):
                os.write(file, f"{path} was not flushed\n".encode())
        pending[target.parent.stat().st_ino] = target.parent

    def told() -> None:
        for path in pending.values():
            os.write(file, f"{path} was not flushed after a rename\n".encode())
        os.write(file, f"{renames}\n".encode())

    os.fsync = fsync
    sys.addaudithook(heard)
    at_end.append(told)


at_end: list[Callable[[], None]] = []
