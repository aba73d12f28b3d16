"""Cells as jobs of a Slurm cluster, by submitit.

Slurm's machines share the disk that the run's folder is on. What the options here do not say, the
environment does, as ever with Slurm: ``SBATCH_PARTITION``, ``SBATCH_TIMELIMIT``.
A job that is preempted or runs out of its time is queued again, and goes on from its checkpoint.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, UncompletedJobError

from bench.errors import BenchError
from bench.executors import parcel
from bench.executors.base import Began, Crew, Ended, Event, Job, Kit, Lost, Needs, Outcome
from bench.executors.worker import Telling, alone, make, seldom
from bench.failures import failure_of
from bench.making import Sources
from bench.plugins import load_plugin
from bench.sweep import Cell

DAY = 24 * 60
"""Minutes that a job may take, unless ``--cell-timeout`` or ``SBATCH_TIMELIMIT`` says otherwise."""
SPARE = 10
"""Minutes beyond ``--cell-timeout``, which is the one to end a cell, before Slurm ends its job."""
GIB = 2**30
STOP = "stop"
AS_LONG_AS_IT_TAKES = -1.0
"""To wait for the job of a run that was killed: it cannot notice, and comes to the same."""


class Slurm(Crew):
    """A Slurm cluster; ``--executor slurm``.

    Args:
        cluster: ``slurm``, or one of submitit's stand-ins: ``local`` (processes), ``debug`` (here).
    """

    name = "slurm"
    afar = True

    def __init__(
        self, jobs: int | None, needs: Needs, *, cluster: str = "slurm", **terms: Any
    ) -> None:
        super().__init__(jobs, needs, **terms)
        self.cluster = cluster
        self.threads = needs.cpus or 1
        self.handles: dict[str, submitit.Job[Outcome]] = {}
        self.begun: set[str] = set()

    def check(self, cells: Sequence[Cell]) -> None:
        if self.cluster == "slurm" and shutil.which("sbatch") is None:
            raise BenchError("--executor slurm needs Slurm: there is no sbatch on this machine")
        self.gpus = 0
        if any(cell.device != "cpu" for cell in cells):
            if self.needs.gpus != int(self.needs.gpus):
                raise BenchError("Slurm gives whole GPUs: --cell-gpus must be an integer")
            self.gpus = int(self.needs.gpus)

    def begin(self, kit: Kit) -> None:
        self.folder = folder = kit.folder.resolve()
        folder.mkdir(exist_ok=True)
        (folder / STOP).unlink(missing_ok=True)
        self.plugin = None if kit.plugin is None else kit.plugin.resolve()
        parcel.write(dict(kit.sources), folder / "data")
        limit = self.cell_timeout
        minutes = DAY if limit is None else math.ceil(limit / 60) + SPARE
        self.submitter = submitit.AutoExecutor(folder=folder / "jobs", cluster=self.cluster)
        self.submitter.update_parameters(
            name="bench",
            timeout_min=minutes,
            cpus_per_task=self.threads,
            gpus_per_node=self.gpus,
            mem_gb=None if self.needs.memory is None else self.needs.memory / GIB,
            slurm_array_parallelism=self.jobs or 256,
        )

    def submit(self, jobs: Sequence[Job]) -> None:
        make = _Make(self.folder, self.plugin, self.threads)
        # Their processes are in another folder.
        here = [replace(job, workplace=job.workplace.resolve()) for job in jobs]
        for job, handle in zip(jobs, self.submitter.map_array(make, here), strict=True):
            self.handles[job.cell.id] = handle
            self.begun.discard(job.cell.id)

    def events(self, seconds: float) -> list[Event]:
        found: list[Event] = []
        for cell_id, handle in list(self.handles.items()):
            if cell_id not in self.begun and handle.state.upper() == "RUNNING":
                self.begun.add(cell_id)
                found.append(Began(cell_id, f"job {handle.job_id}"))
            if handle.done():
                del self.handles[cell_id]
                found.append(self._ended(cell_id, handle))
        if not found:
            time.sleep(seconds)
        return found

    def _ended(self, cell_id: str, handle: submitit.Job[Outcome]) -> Event:
        """What a job that is over came to."""
        try:
            return Ended(cell_id, handle.result())
        except UncompletedJobError as error:
            return Lost(cell_id, f"job {handle.job_id} ended: {str(error).splitlines()[0]}")
        except FailedJobError as error:
            return Ended(cell_id, failure_of(error))

    def kill(self, cell_id: str) -> None:
        _cancel(self.handles.pop(cell_id))

    def interrupt(self) -> None:
        (self.folder / STOP).touch()
        for cell_id, handle in self.handles.items():
            if cell_id not in self.begun:
                _cancel(handle)

    def end(self) -> None:
        for handle in self.handles.values():
            _cancel(handle)
        shutil.rmtree(self.folder, ignore_errors=True)


def _cancel(handle: submitit.Job[Any]) -> None:
    with suppress(Exception):  # one that is over, or whose queue does not answer
        handle.cancel(check=False)


class _Make(submitit.helpers.Checkpointable):  # type: ignore[misc]
    """A cell, made by the job that calls this; called again once its job is queued again."""

    def __init__(self, folder: Path, plugin: Path | None, threads: int) -> None:
        self.folder = folder
        self.plugin = plugin
        self.threads = threads

    def __call__(self, job: Job) -> Outcome:
        load_plugin(self.plugin)
        sources = Sources(None, False, parcel.read(self.folder / "data"))
        watch = Telling(job.cell, lambda moved: None)
        interrupted = seldom((self.folder / STOP).exists)
        work = partial(make, job, sources, self.plugin, self.threads, watch, interrupted)
        return alone(self.folder, AS_LONG_AS_IT_TAKES, job.cell, work)
