"""What an executor is to the rest of the harness: a crew that takes jobs and tells of them.

A job is one cell, to be trained and evaluated. Whatever the crew, the files of a cell are in its
workplace in the run's folder when it is told to have ended, and a job that is submitted again goes
on from the checkpoint that is there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bench.errors import RunError
from bench.failures import Failure
from bench.sweep import Cell
from datasets import Source


@dataclass(frozen=True)
class Needs:
    """What a cell takes of a machine while it is trained.

    Attributes:
        cpus: threads that it computes with; None for a fair share (here) or one (on a cluster).
        gpus: accelerators, which may be a fraction; for cells that are not on the CPU.
        memory: bytes to be set aside; None for no demand.
    """

    cpus: int | None = None
    gpus: float = 1
    memory: int | None = None


@dataclass(frozen=True)
class Job:
    """One cell to be trained and evaluated.

    Attributes:
        workplace: its folder, on the disk of the one who asks.
        source: a hash of the code that is to do it.
    """

    cell: Cell
    workplace: Path
    source: str
    verify_gradients: bool = False


@dataclass(frozen=True)
class Kit:
    """What all jobs need.

    Attributes:
        sources: the data, by dataset and split.
        plugin: the file that registers their algorithms or datasets.
        folder: where a crew may leave files for its members, on the disk of the one who asks.
    """

    sources: Mapping[tuple[str, str], Source]
    plugin: Path | None
    folder: Path


# What a crew tells.


@dataclass(frozen=True)
class Began:
    """A cell is being made, and where."""

    cell_id: str
    where: str


@dataclass(frozen=True)
class Moved:
    """How far a cell is."""

    cell_id: str
    stage: str
    done: int
    total: int
    note: str = ""


Outcome = dict[str, Any] | Failure | RunError | None
"""The cell's figures; or why it came to nothing; or what ends the run; or
None where it was interrupted, and goes on from its checkpoint."""


@dataclass(frozen=True)
class Ended:
    """A job is over."""

    cell_id: str
    outcome: Outcome


@dataclass(frozen=True)
class Lost:
    """The process or the machine that made a cell is gone."""

    cell_id: str
    how: str


Event = Began | Moved | Ended | Lost


class Crew(ABC):
    """Processes that train and evaluate cells.

    Args:
        jobs: how many cells at a time; None for as many as there is room for.
        needs: of each.
        cell_timeout: seconds after which a cell has failed; None for no limit.
    """

    name: ClassVar[str]
    afar: ClassVar[bool] = False
    """Whether its machines may have devices that this one lacks."""

    def __init__(
        self,
        jobs: int | None,
        needs: Needs,
        cell_timeout: float | None = None,
    ) -> None:
        self.jobs = jobs
        self.needs = needs
        self.cell_timeout = cell_timeout

    def check(self, cells: Sequence[Cell]) -> None:  # noqa: B027 - most can take any
        """Raise :class:`bench.errors.BenchError` for cells that it has no room for."""

    @abstractmethod
    def begin(self, kit: Kit) -> None:
        """Get ready for jobs.

        Raises:
            BenchError: it cannot.
        """

    @abstractmethod
    def submit(self, jobs: Sequence[Job]) -> None:
        """Take jobs: no more than ``jobs`` at a time are submitted and not over."""

    @abstractmethod
    def events(self, seconds: float) -> list[Event]:
        """What happened since it was last asked; waits as long for something to happen."""

    @abstractmethod
    def kill(self, cell_id: str) -> None:
        """End a job at once; it is not heard of again."""

    @abstractmethod
    def interrupt(self) -> None:
        """Ask all jobs to write a checkpoint and end."""

    @abstractmethod
    def end(self) -> None:
        """End whatever still runs, and leave nothing behind."""
