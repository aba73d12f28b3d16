"""What it costs to have cells made by other processes: python -m tests.performance.executor_costs

Makes the same short cells by a plain loop, which trains and evaluates and keeps nothing, by a run
in one process, and by crews of processes on this machine; cells are not measured, which takes
processes of its own. Prints the table of docs/reliability.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from bench import runner
from bench.executors import Needs
from bench.executors.local import Local
from bench.making import Sources
from bench.plugins import load_plugin
from bench.progress import Display
from bench.protocol import evaluate
from bench.sweep import Cell, Sweep
from bench.training import train

TINY = Path(__file__).resolve().parents[1] / "bench" / "tiny.py"


def asked(cells: int) -> Sweep:
    """So many cells of two iterations and ten test episodes."""
    return Sweep(
        algos=["maml"],
        datasets=["tiny"],
        devices=["cpu"],
        seeds=list(range(cells)),
        model="fc",
        iterations=2,
        meta_batch=2,
        episodes=10,
        val_episodes=2,
        val_every=2,
        plugin=TINY,
    )


def plain(cells: list[Cell], sources: Sources) -> None:
    """The cells without a harness."""
    for cell in cells:
        splits = [sources.require(cell.dataset, split, "cpu") for split in ("train", "val", "test")]
        algorithm, _ = train(cell, splits[0], splits[1], None)
        evaluate(algorithm, splits[2], cell.test_spec, cell.episodes, cell.eval_steps)


def by(crew: Local | None, sweep: Sweep, cells: list[Cell], sources: Sources) -> None:
    """The cells as a run, in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        display = Display(Console(quiet=True))
        summary = runner.run(sweep, cells, sources, Path(folder) / "r", display, crew=crew)
        assert (summary["status"] == "complete").all()
        assert len(summary) == len(cells)


@contextmanager
def unmeasured() -> Iterator[None]:
    """Leave out the measurements."""
    kept = runner._measure
    runner._measure = lambda cells, work: runner._Measured([(cell, None) for cell in cells], [])
    try:
        yield
    finally:
        runner._measure = kept


def clocked(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds by the wall's clock and of processor time, of this process and those it started."""
    times, began = os.times(), time.perf_counter()
    work()
    taken = [after - before for before, after in zip(times[:4], os.times()[:4], strict=True)]
    return time.perf_counter() - began, sum(taken)


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--cells", type=int, default=200)
    options.add_argument("--jobs", type=int, nargs="*", default=[1, 2])
    chosen = options.parse_args()
    torch.set_num_threads(1)
    load_plugin(TINY)
    sweep = asked(chosen.cells)
    cells, sources = sweep.cells(), Sources(None, False)
    plain(cells[:2], sources)  # what is imported late is imported now
    ways: dict[str, Callable[[], None]] = {
        "a plain loop": lambda: plain(cells, sources),
        "a run in one process": lambda: by(None, sweep, cells, sources),
    }
    for jobs in chosen.jobs:
        crew = Local(jobs, Needs(cpus=1))
        ways[f"`--executor local --jobs {jobs}`"] = lambda crew=crew: by(
            crew, sweep, cells, sources
        )
    with unmeasured():
        found = {name: clocked(work) for name, work in ways.items()}
    loop_wall, loop_cpu = found["a plain loop"]
    print(f"{len(cells)} cells, {os.cpu_count()} cores\n")
    print("| | wall time, of the loop's | processor time, of the loop's | more a cell |")
    print("| --- | ---: | ---: | ---: |")
    for name, (wall, cpu) in found.items():
        more = 1e3 * (cpu - loop_cpu) / len(cells)
        print(f"| {name} | {wall / loop_wall:.2f} | {cpu / loop_cpu:.2f} | {more:.0f} ms |")


if __name__ == "__main__":
    main()
