"""What a run does before and after its cells."""

from pathlib import Path

import pytest

from bench import measure, runner
from bench.errors import SourceChangedError
from bench.executors.base import Job
from bench.executors.worker import Telling, make
from bench.making import Sources
from bench.store import Run
from bench.sweep import Cell
from tests.bench.conftest import QUICK, TINY


def test_an_estimate_counts_training_all_episodes_and_measuring(
    cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 steps; 20 test episodes and 6 validations of 10; 9 turns of a step and 5 episodes."""
    took = {measure.STEP: 2.0, measure.EVALUATION: 5 * 0.25}
    monkeypatch.setattr(measure.Subject, "once", lambda _, phase, repeat: {"seconds": took[phase]})
    sources = Sources(None, False)
    tested = 30 * 2 + (20 + 6 * 10) * 0.25
    assert runner.estimate_seconds([cell], sources, "never") == {cell.id: tested}
    measured = 9 * (2 + 5 * 0.25)
    assert runner.estimate_seconds([cell], sources) == {cell.id: tested + measured}


def test_a_process_that_finds_other_source_makes_nothing(cell: Cell, tmp_path: Path) -> None:
    job = Job(cell, tmp_path / "cell", "what it was")
    watch = Telling(cell, lambda event: None)
    outcome = make(job, Sources(None, False), TINY, 1, watch, lambda: False)
    assert isinstance(outcome, SourceChangedError)
    assert not job.workplace.exists()


def test_what_fails_because_the_source_has_changed_is_no_cells_failure(
    bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plug-in that is edited while its cells are measured."""
    hashes = iter(["as it was"] * 2)
    monkeypatch.setattr(runner, "source_hash", lambda plugin: next(hashes, "edited"))

    def fails(cells, *_: object) -> None:
        raise measure.MeasuringError(cells[0], "its plug-in cannot be read")

    monkeypatch.setattr(measure, "measure", fails)
    status, _, err = bench("run", "--algos", "maml", *QUICK, "--out", "r")
    assert status == 1
    assert err.startswith("bench: the source code has changed since this run began")
    run = Run(tmp_path / "r")
    assert (run.failures(), run.records()) == ({}, [])
