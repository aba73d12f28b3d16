"""Cells as tasks of a Ray cluster.

The driver, on a node of the cluster, keeps the run's folder; no other node needs its disk, nor the
data sets, nor this project's code (only its dependencies): code, plug-in and checkpoints travel
with the tasks, the data once to each node, and what a cell came to travels back. Ray retries
nothing itself: a cell whose node is lost is submitted again with the newest checkpoint that it
sent, by the same rule as everywhere (:mod:`bench.dispatch`).
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import algorithms
import bench
import datasets
from bench.errors import BenchError
from bench.executors.base import Began, Crew, Ended, Event, Job, Kit, Lost, Moved, Needs, Outcome
from bench.executors.parcel import pack, unpack
from bench.executors.worker import Telling, make, seldom
from bench.failures import failure_of
from bench.files import make_folder, write_bytes
from bench.making import STATE, Sources
from bench.plugins import load_plugin
from bench.store import REQUIRED
from bench.sweep import Cell
from bench.training import Iteration

PORT = 6379


@dataclass(frozen=True)
class _Saved:
    """A checkpoint, on its way to the driver."""

    cell_id: str
    contents: bytes


class _Post:
    """Where workers leave word for the driver, and it for them. Should its process be lost, so is
    what was left there: how far cells are, and a checkpoint or two."""

    def __init__(self) -> None:
        self.left: list[Event | _Saved] = []
        self.stopping = False

    def leave(self, word: Event | _Saved) -> None:
        self.left.append(word)

    def collect(self) -> list[Event | _Saved]:
        left, self.left = self.left, []
        return left

    def stop(self) -> None:
        self.stopping = True

    def stopped(self) -> bool:
        return self.stopping


class Ray(Crew):
    """A Ray cluster; ``--executor ray``.

    Args:
        address: its head, ``HOST`` or ``HOST:PORT``; by default ``$RAY_ADDRESS``, else a cluster
            of this machine alone, for as long as the run takes.
    """

    name = "ray"
    afar = True

    def __init__(
        self, jobs: int | None, needs: Needs, *, address: str | None = None, **terms: Any
    ) -> None:
        super().__init__(jobs, needs, **terms)
        self.address = address or os.environ.get("RAY_ADDRESS") or "local"
        self.threads = needs.cpus or 1
        self.tasks: dict[str, Any] = {}
        self.jobs_of: dict[str, Job] = {}
        self.begun: set[str] = set()

    def check(self, cells: Sequence[Cell]) -> None:
        self._connect()
        for cell in cells:
            wanted = self._resources(cell)
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            if not any(all(n.get(k, 0) >= v for k, v in wanted.items()) for n in nodes):
                said = ", ".join(f"{value:,.12g} {name}" for name, value in wanted.items())
                raise BenchError(f"no node of the Ray cluster has {said}, which {cell} needs")

    def _connect(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # what a benchmark does is its own
        address = self.address
        if ":" not in address and address not in ("auto", "local"):
            address = f"{address}:{PORT}"
        code = [
            str(Path(str(package.__file__)).parent) for package in (bench, algorithms, datasets)
        ]
        try:
            ray.init(
                address=address,
                runtime_env={"py_modules": code},
                log_to_driver=False,
                logging_level="ERROR",
                **({"include_dashboard": False} if address == "local" else {}),
            )
        except (RayError, ConnectionError, RuntimeError, ValueError) as error:
            why = str(error).strip().splitlines()[0]
            raise BenchError(f"cannot join the Ray cluster at {self.address}: {why}") from error

    def _resources(self, cell: Cell) -> dict[str, float]:
        """What a cell needs, by Ray's names."""
        gpus = 0.0 if cell.device == "cpu" else self.needs.gpus
        wanted = {"CPU": self.threads, "GPU": gpus, "memory": self.needs.memory or 0}
        return {name: float(value) for name, value in wanted.items() if value}

    def begin(self, kit: Kit) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        post = ray.remote(_Post).options(
            num_cpus=0, scheduling_strategy=here, max_restarts=-1, max_task_retries=-1
        )
        self.post = post.remote()
        self.stopping = False
        self.data = ray.put(pack(dict(kit.sources)))
        plugin = kit.plugin
        self.plugin = None if plugin is None else (plugin.name, plugin.read_text("utf-8"))

    def submit(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            wanted = self._resources(job.cell)
            task = ray.remote(_make).options(
                num_cpus=wanted["CPU"],
                num_gpus=wanted.get("GPU", 0),
                memory=wanted.get("memory"),
                max_retries=0,
                scheduling_strategy="SPREAD",
            )
            state = job.workplace / STATE
            checkpoint = state.read_bytes() if state.exists() else None
            arguments = (job, self.data, self.plugin, self.threads, self.post, checkpoint)
            self.tasks[job.cell.id] = task.remote(*arguments)
            self.jobs_of[job.cell.id] = job
            self.begun.discard(job.cell.id)

    def events(self, seconds: float) -> list[Event]:
        if self.tasks:
            ray.wait(list(self.tasks.values()), num_returns=1, timeout=seconds)
        if self.stopping:  # said again, should the post have been started anew
            self.post.stop.remote()
        found: list[Event] = []
        for word in ray.get(self.post.collect.remote()):
            if isinstance(word, _Saved):
                _write(self.jobs_of[word.cell_id].workplace, {STATE: word.contents})
                continue
            if isinstance(word, Began):
                self.begun.add(word.cell_id)
            found.append(word)
        over = []
        if self.tasks:
            tasks = list(self.tasks.values())
            over = ray.wait(tasks, num_returns=len(tasks), timeout=0)[0]
        for cell_id in [cell_id for cell_id, task in self.tasks.items() if task in over]:
            found.append(self._ended(cell_id))
        return found

    def _ended(self, cell_id: str) -> Event:
        """What a task that is over came to."""
        try:
            outcome, files = ray.get(self.tasks.pop(cell_id))
        except TaskCancelledError:
            return Ended(cell_id, None)
        except RayTaskError as error:
            return Ended(cell_id, failure_of(error))
        except RayError as error:
            return Lost(cell_id, str(error).strip().splitlines()[0])
        _write(self.jobs_of[cell_id].workplace, files)
        return Ended(cell_id, outcome)

    def kill(self, cell_id: str) -> None:
        ray.cancel(self.tasks.pop(cell_id), force=True)

    def interrupt(self) -> None:
        self.stopping = True
        for cell_id, task in self.tasks.items():
            if cell_id not in self.begun:
                ray.cancel(task)

    def end(self) -> None:
        with suppress(RayError):
            for task in self.tasks.values():
                ray.cancel(task, force=True)
        ray.shutdown()


def _write(workplace: Path, files: dict[str, bytes]) -> None:
    make_folder(workplace)
    for name, contents in files.items():
        write_bytes(workplace / name, contents)


# In a worker's process, on any node.


def _make(
    job: Job,
    data: tuple[bytes, list[Any]],
    plugin: tuple[str, str] | None,
    threads: int,
    post: Any,
    checkpoint: bytes | None,
) -> tuple[Outcome, dict[str, bytes]]:
    """A cell, made in a folder of this node's own: what it came to, and its files."""
    node = ray.get_runtime_context().get_node_id()[:6]
    post.leave.remote(Began(job.cell.id, f"{platform.node()} (node {node})"))
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        place = Path(folder) / "cell"
        place.mkdir()
        if checkpoint is not None:
            (place / STATE).write_bytes(checkpoint)
        path = None
        if plugin is not None:
            path = Path(folder) / plugin[0]
            path.write_text(plugin[1], "utf-8")
        load_plugin(path)
        sources = Sources(None, False, unpack(*data))
        watch = _Sending(job.cell, place / STATE, post.leave.remote)
        stopped = seldom(lambda: bool(ray.get(post.stopped.remote())))
        outcome = make(replace(job, workplace=place), sources, path, threads, watch, stopped)
        kept = REQUIRED if isinstance(outcome, dict) else (STATE,) if outcome is None else ()
        there = [name for name in kept if (place / name).exists()]
        return outcome, {name: (place / name).read_bytes() for name in there}


class _Sending(Telling):
    """Tells of a cell's progress, and sends every checkpoint that it finds."""

    def __init__(self, cell: Cell, state: Path, send: Callable[[Moved | _Saved], Any]) -> None:
        super().__init__(cell, send)
        self.state = state
        self.send = send
        self.sent = self._written()

    def iteration(self, progress: Iteration) -> None:
        super().iteration(progress)
        if (written := self._written()) != self.sent:
            self.sent = written
            self.send(_Saved(self.cell.id, self.state.read_bytes()))

    def _written(self) -> int:
        return self.state.stat().st_mtime_ns if self.state.exists() else 0
