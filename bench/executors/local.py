"""Cells in processes on this machine, several at a time.

Each process takes one cell after another, and computes with its share of the threads; where cells
are on GPUs, it has one to itself. The data is in a file that all of them map. A process that dies
takes nothing with it but what its cell did since its checkpoint.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import shutil
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch

from bench.errors import BenchError
from bench.executors.base import Began, Crew, Ended, Event, Job, Kit, Lost, Needs
from bench.failures import Failure
from bench.plugins import load_plugin
from bench.signals import unsignalled
from bench.sweep import Cell

STOP = "stop"
PATIENCE_SECONDS = 60.0
"""How long the process of a run that was killed may take to notice."""
GPUS = "CUDA_VISIBLE_DEVICES"
ALL_THREADS = torch.get_num_threads()
"""As many as torch computes with unless told otherwise: OMP_NUM_THREADS, or the cores."""


@dataclass
class _Member:
    """One process, and the job that it has."""

    seat: int
    process: SpawnProcess
    connection: Connection
    job: Job | None = None


class Local(Crew):
    """Processes on this machine; ``--executor local``."""

    name = "local"

    def __init__(self, jobs: int | None, needs: Needs, **terms: Any) -> None:
        super().__init__(jobs or 1, needs, **terms)
        self.size = jobs or 1
        self.threads = needs.cpus or max(1, ALL_THREADS // self.size)
        self.members: list[_Member] = []

    def check(self, cells: Sequence[Cell]) -> None:
        devices = {cell.device for cell in cells if cell.device.startswith("cuda")}
        if devices - {"cuda", "cuda:0"}:
            raise BenchError(
                "--executor local gives each process a GPU of its own, which is cuda:0 to it; "
                f"ask for --devices cuda:0, not {max(devices)}"
            )
        if devices and self.size > torch.cuda.device_count():
            raise BenchError(
                f"--jobs {self.size} gives each process a GPU of its own; "
                f"there are {torch.cuda.device_count()}"
            )

    def begin(self, kit: Kit) -> None:
        # Imported here, since the processes import this file, too.
        from bench.executors import parcel

        self.kit = kit
        kit.folder.mkdir(exist_ok=True)
        self.parcel = kit.folder / "data"
        parcel.write(dict(kit.sources), self.parcel)

    def submit(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            member = next((m for m in self.members if m.job is None), None) or self._hired()
            member.job = job
            with suppress(OSError):  # one that has died meanwhile is met with in events()
                member.connection.send(job)

    def _hired(self) -> _Member:
        seat = min(set(range(self.size)) - {member.seat for member in self.members})
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_serve,
            args=(theirs, self.parcel, self.kit.plugin, self.threads, _gpu(seat)),
            daemon=True,
        )
        with unsignalled():
            process.start()
        theirs.close()
        member = _Member(seat, process, ours)
        self.members.append(member)
        return member

    def events(self, seconds: float) -> list[Event]:
        ready = wait([member.connection for member in self.members], seconds)
        heard = [member for member in self.members if member.connection in ready]
        return [event for member in heard for event in self._heard(member)]

    def _heard(self, member: _Member) -> list[Event]:
        """All that a member has said, up to its death."""
        found: list[Event] = []
        try:
            while member.connection.poll():
                event: Event = member.connection.recv()
                found.append(event)
                if isinstance(event, Ended):
                    member.job = None
                    if _unsound(event):
                        self._buried(member)
                        break
        except (EOFError, OSError):
            how = self._buried(member)
            if member.job is not None:
                found.append(Lost(member.job.cell.id, how))
        return found

    def _buried(self, member: _Member) -> str:
        """Take leave of a member; returns how it ended."""
        self.members.remove(member)
        member.connection.close()
        member.process.join(timeout=5)
        if member.process.is_alive():
            member.process.kill()
            member.process.join()
        status = member.process.exitcode or 0
        if status >= 0:
            return f"the process ended with status {status}"
        name = signal.Signals(-status).name
        perhaps = ", perhaps for want of memory" if name == "SIGKILL" else ""
        return f"the process was ended by {name}{perhaps}"

    def kill(self, cell_id: str) -> None:
        for member in [m for m in self.members if m.job and m.job.cell.id == cell_id]:
            member.process.kill()
            self._buried(member)

    def interrupt(self) -> None:
        for member in self.members:
            with suppress(OSError):
                member.connection.send(STOP)

    def end(self) -> None:
        for member in self.members:
            member.process.kill()
        for member in list(self.members):
            self._buried(member)
        shutil.rmtree(self.kit.folder, ignore_errors=True)


def _gpu(seat: int) -> str:
    """The GPU of a seat, as the environment names it to a process."""
    seen = os.environ.get(GPUS)
    there = seen.split(",") if seen else []
    return there[seat] if seat < len(there) else str(seat)


def _serve(connection: Connection, data: Path, plugin: Path | None, threads: int, gpu: str) -> None:
    """Make the cells that are asked for, until the one who asks is gone."""
    os.environ[GPUS] = gpu
    from bench.executors import parcel
    from bench.executors.worker import Telling, alone, make
    from bench.making import Sources

    asked: queue.Queue[Job] = queue.Queue()
    stopped = threading.Event()

    def listen() -> None:
        try:
            while True:
                said = connection.recv()
                if said == STOP:
                    stopped.set()
                else:
                    asked.put(said)
        except (EOFError, OSError):
            os._exit(0)  # whatever is in the works: a checkpoint is whole or not there

    threading.Thread(target=listen, daemon=True).start()
    load_plugin(plugin)
    sources = Sources(None, False, parcel.read(data))
    where = f"process {os.getpid()}"
    while True:
        job = asked.get()
        connection.send(Began(job.cell.id, where))
        watch = Telling(job.cell, connection.send)
        work = partial(make, job, sources, plugin, threads, watch, stopped.is_set)
        outcome = alone(data.parent, PATIENCE_SECONDS, job.cell, work)
        ended = Ended(job.cell.id, outcome)
        connection.send(ended)
        if _unsound(ended):
            return


def _unsound(ended: Ended) -> bool:
    """Whether the process should make way for a new one: what happened may have left a mark."""
    return isinstance(ended.outcome, Failure) and ended.outcome.unforeseen
