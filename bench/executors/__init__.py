"""Where cells are trained: in processes on this machine, on a Ray cluster, by Slurm.

One file each, imported when asked for, since Ray and submitit are extras.
"""

from __future__ import annotations

from bench.errors import BenchError
from bench.executors.base import (
    Began,
    Crew,
    Ended,
    Event,
    Job,
    Kit,
    Lost,
    Moved,
    Needs,
    Outcome,
)

__all__ = [
    "EXECUTORS",
    "Began",
    "Crew",
    "Ended",
    "Event",
    "Job",
    "Kit",
    "Lost",
    "Moved",
    "Needs",
    "Outcome",
    "hire",
]

EXECUTORS = ("local", "ray", "slurm")
GIB = 2**30
MOST = 1e9
"""Of seconds and of GiB: above it no machine is meant."""


def hire(
    executor: str | None,
    *,
    jobs: int | None = None,
    address: str | None = None,
    cpus: int | None = None,
    gpus: float | None = None,
    memory_gib: float | None = None,
    cell_timeout: float | None = None,
) -> Crew | None:
    """The crew that was asked for; None where cells are trained in this process.

    Args:
        executor: one of :data:`EXECUTORS`; None for this process, or, where several jobs or a time
            limit need processes of their own, ``local``.
        jobs: cells at a time.
        address: of a Ray cluster.
        cpus, gpus, memory_gib: what a cell needs.
        cell_timeout: seconds after which a cell has failed.

    Raises:
        BenchError: what does not go together, or a package that is not there.
    """
    if executor is None and (cell_timeout is not None or (jobs or 1) > 1):
        executor = "local"
    asked = {
        "--address": (address, ("ray",)),
        "--cell-gpus": (gpus, ("ray", "slurm")),
        "--cell-memory": (memory_gib, ("ray", "slurm")),
    }
    for option, limit in (("--cell-timeout", cell_timeout), ("--cell-memory", memory_gib)):
        if limit is not None and not 0 < limit < MOST:
            raise BenchError(f"{option} is {limit:g}; it must be positive and below {MOST:g}")
    for option, (value, able) in asked.items():
        if value is not None and executor not in able:
            raise BenchError(f"{option} is for --executor {' and '.join(able)}")
    memory = None if memory_gib is None else int(memory_gib * GIB)
    needs = Needs(cpus, 1 if gpus is None else gpus, memory)
    if executor is None:
        return None
    if executor == "local":
        from bench.executors.local import Local

        return Local(jobs, needs, cell_timeout=cell_timeout)
    try:
        if executor == "ray":
            from bench.executors.ray import Ray

            return Ray(jobs, needs, address=address, cell_timeout=cell_timeout)
        if executor == "slurm":
            from bench.executors.slurm import Slurm

            return Slurm(jobs, needs, cell_timeout=cell_timeout)
    except ModuleNotFoundError as error:
        raise BenchError(
            f"--executor {executor} needs {error.name}, which is not installed: "
            f"pip install '.[{executor}]'"
        ) from error
    raise BenchError(f"there is no executor {executor!r}; there are {', '.join(EXECUTORS)}")
