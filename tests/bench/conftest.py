"""Cells and commands that take a second or two."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import datasets
from bench import measure, runner
from bench.cli import main
from bench.plugins import load_plugin
from bench.sweep import Cell, Sweep

TINY = Path(__file__).with_name("tiny.py")
QUICK = (
    *("--plugin", str(TINY), "--datasets", "tiny", "--model", "fc", "--devices", "cpu"),
    *("--iterations", "6", "--meta-batch", "2", "--episodes", "20", "--eval-steps", "2"),
)


@pytest.fixture(autouse=True, scope="session")
def _tiny() -> None:
    load_plugin(TINY)


@pytest.fixture
def cell() -> Cell:
    (only,) = Sweep(
        algos=["maml"],
        datasets=["tiny"],
        devices=["cpu"],
        model="fc",
        iterations=30,
        meta_batch=2,
        episodes=20,
        val_episodes=10,
        val_every=5,
        eval_steps=2,
        plugin=TINY,
    ).cells()
    return only


class _Here:
    """What measures a cell in this process, spoken to as if it were in one of its own."""

    def __init__(self, cell: Cell, root: Path | None) -> None:
        source = datasets.get(cell.dataset)(root=root).load("train").to(cell.device)
        self.subject = measure.Subject(cell, source)
        self.cell, self.connection = cell, self

    def send(self, question: tuple[Any, ...]) -> None:
        name, *arguments = question
        self.answer = ("done", getattr(self.subject, name)(*arguments))

    def poll(self, seconds: float) -> bool:
        return True

    def recv(self) -> tuple[str, Any]:
        return self.answer


@contextmanager
def measured_here(
    cell: Cell, root: Path | None, plugin: Path | None, source: str | None = None
) -> Iterator[_Here]:
    """In place of `measure._subject`."""
    yield _Here(cell, root)


@pytest.fixture
def fresh_processes() -> None:
    """Asked for by a test whose commands shall measure each cell in a process of its own, as they
    do for users; others are spared the seconds that such a process takes to start."""


@pytest.fixture
def bench(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> Callable:
    """Run a command in an empty folder: its exit status, what it printed, and its errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    if "fresh_processes" not in request.fixturenames:
        monkeypatch.setattr(measure, "_subject", measured_here)

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(arguments)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the measurements, each of which takes a process that has to import torch."""
    monkeypatch.setattr(
        "bench.runner._measure",
        lambda cells, work: runner._Measured([(cell, None) for cell in cells], []),
    )
