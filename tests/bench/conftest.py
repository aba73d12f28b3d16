"""Cells and commands that take a second or two."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bench import runner
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


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> Callable:
    """Run a command in an empty folder: its exit status, what it printed, and its errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

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
