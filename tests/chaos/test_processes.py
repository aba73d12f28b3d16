"""Processes that are killed, and such as meet on one folder."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from bench.store import Run
from tests.chaos.attempts import (
    PATIENCE_SECONDS,
    Attempt,
    at_operation,
    contents,
    impatient,
    quick,
    setting_the_clock_back,
    signalled,
    sweep,
    watching_for_power_loss,
)
from tests.chaos.conftest import ONE

IN_USE = "bench: r is in use by another run\n"


def test_killed_at_random_moments(tmp_path: Path, whole: bool, counted: Counter[str]) -> None:
    """SIGKILL at random moments of one sweep, which is resumed each time.

    Nine of ten kills come while there are cells to be made, the others when only the summary and
    the figures are left.
    """
    kills, seeds = (200, 40) if whole else (6, 2)
    every = ",".join(map(str, range(seeds)))
    arguments = sweep("r", "--algos", "maml,reptile", "--seeds", every, "--iterations", "8")
    still, killed = tmp_path / "still", tmp_path / "killed"
    for place in (still, killed):
        place.mkdir()

    def undisturbed(place: Path) -> tuple[float, float]:
        attempt = Attempt(arguments, place, quick)
        assert attempt.status() == 0, attempt.err
        return attempt.before_phase, attempt.took  # the last phase is that of the figures

    (all_cells, _), (no_cell, to_end) = undisturbed(still), undisturbed(still)
    a_cell = (all_cells - no_cell) / (2 * seeds)
    chance = random.Random(0)
    phases: Counter[str] = Counter()
    for reach, wanted in ((no_cell + a_cell, kills - kills // 10), (to_end, kills)):
        while phases.total() < wanted:
            attempt = Attempt(arguments, killed, quick)
            counted["starts"] += 1
            if attempt.kill_after(chance.uniform(0, reach)):
                phases[attempt.phase] += 1
        undisturbed(killed)
    expected = contents(still / "r")
    assert contents(killed / "r") == expected
    counted["kills"] = phases.total()
    counted.update({f"of them in {phase}": count for phase, count in phases.most_common()})
    counted["cells compared"] = len(expected["order"])


def test_killed_at_operations_on_files(
    tmp_path: Path, whole: bool, undisturbed: dict[str, Any], counted: Counter[str]
) -> None:
    """SIGKILL at the n-th operation on the run's files, for every n."""

    def ended(place: Path, number: int) -> int:
        place.mkdir()
        arguments = sweep("r", *ONE)
        return Attempt(arguments, place, quick, partial(at_operation, number, place / "r")).status()

    assert ended(tmp_path / "counting", 0) == 0
    there = int((tmp_path / "counting" / "r.operations").read_text())
    chosen = range(1, there + 1) if whole else [there // 2, there - 4]
    for number in chosen:
        place = tmp_path / str(number)
        assert ended(place, number) == -signal.SIGKILL
        counted["kills"] += 1
        assert Attempt(sweep("r", *ONE), place, quick).status() == 0
        assert contents(place / "r") == undisturbed
        counted["cells compared"] += 1


def test_measuring_processes_end_with_their_run(
    place: Path, undisturbed: dict[str, Any], counted: Counter[str]
) -> None:
    """SIGKILL while other processes measure: they end too, and do not hold the folder."""
    attempt = Attempt(sweep("r", *ONE), place)
    while not (children := [p for p in attempt.orphans() if p.pid != attempt.process.pid]):
        assert attempt.process.is_alive()
        time.sleep(0.2)
    attempt.process.kill()
    attempt.status()
    counted["kills"] += 1
    counted["processes left behind at first"] += len(children)
    again = Attempt(sweep("r", *ONE), place, quick)
    assert again.status() == 0, again.err
    deadline = time.monotonic() + PATIENCE_SECONDS
    while attempt.orphans() and time.monotonic() < deadline:
        time.sleep(0.2)
    counted["processes left behind at last"] += len(attempt.orphans())
    assert not attempt.orphans()
    assert "Traceback" not in attempt.err
    assert contents(place / "r") == undisturbed


def test_the_run_killed_whose_cells_other_processes_make(
    tmp_path: Path, whole: bool, counted: Counter[str]
) -> None:
    """SIGKILL of a run while two processes make its cells: they end too, and it goes on at once."""
    by_one = sweep("r", "--algos", "maml", "--seeds", "0,1", "--iterations", "60")
    arguments = [*by_one, "--jobs", "2", "--cell-cpus", "1"]
    places = [tmp_path / str(number) for number in range(11 if whole else 2)]
    for place in places:
        place.mkdir()
    assert Attempt(by_one, places[0], quick).status() == 0
    expected = contents(places[0] / "r")
    chance = random.Random(0)
    for place in places[1:]:
        attempt = Attempt(arguments, place, quick)
        while not list((place / "r" / "cells").glob(".*")):
            assert attempt.process.is_alive(), attempt.err
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.5))
        workers = [p for p in attempt.orphans() if p.pid != attempt.process.pid]
        attempt.process.kill()
        assert attempt.status() == -signal.SIGKILL
        counted["kills"] += 1
        counted["processes left behind at first"] += len(workers)
        again = Attempt(arguments, place, quick)
        assert again.status() == 0, again.err
        assert not attempt.orphans()
        assert contents(place / "r") == expected
        counted["cells compared"] += len(expected["order"])


def test_two_runs_on_one_folder(
    tmp_path: Path, whole: bool, undisturbed: dict[str, Any], counted: Counter[str]
) -> None:
    """Two runs on one folder at once, the first then killed and its lock file left behind."""
    for number in range(20 if whole else 1):
        place = tmp_path / str(number)
        place.mkdir()
        stopping = partial(signalled, "checkpoint", signal.SIGSTOP)
        first = Attempt(sweep("r", *ONE), place, quick, stopping)
        first.wait_until_stopped()
        second = Attempt(sweep("r", *ONE), place, quick)
        assert (second.status(), second.err) == (2, IN_USE)
        counted["runs refused"] += 1
        first.process.kill()
        assert first.status() == -signal.SIGKILL
        counted["kills"] += 1
        assert (place / "r" / ".lock").exists()
        third = Attempt(sweep("r", *ONE), place, quick)
        assert third.status() == 0, third.err
        assert contents(place / "r") == undisturbed
        counted["cells compared"] += 1


def test_two_runs_started_together(
    tmp_path: Path, whole: bool, undisturbed: dict[str, Any], counted: Counter[str]
) -> None:
    """Two runs started on one folder at the same moment."""
    for number in range(20 if whole else 1):
        places = [tmp_path / f"{number}{name}" for name in "ab"]
        for place in places:
            place.mkdir()
        shared = str(tmp_path / str(number))
        both = [Attempt(sweep(shared, *ONE), place, quick, impatient) for place in places]
        statuses = [attempt.status() for attempt in both]
        refused = [attempt for attempt in both if attempt.process.exitcode == 2]
        assert statuses.count(0) + len(refused) == 2
        assert len(refused) < 2
        assert all(a.err == IN_USE.replace("r is", f"{shared} is") for a in refused)
        assert contents(Path(shared)) == undisturbed
        counted["runs refused"] += len(refused)
        counted["cells compared"] += 1


def test_renames_survive_a_loss_of_power(
    place: Path, undisturbed: dict[str, Any], counted: Counter[str]
) -> None:
    """Every rename in a run: what it names is flushed to the disk before, its folder after."""
    watching = partial(watching_for_power_loss, place / "r")
    assert Attempt(sweep("r", *ONE), place, quick, watching).status() == 0
    *unsafe, renames = (place / "r.unsafe").read_text().splitlines()
    assert not unsafe
    counted["renames"] = int(renames)
    assert counted["renames"] > 10
    assert contents(place / "r") == undisturbed


def test_the_clock_set_back(
    place: Path, undisturbed: dict[str, Any], counted: Counter[str]
) -> None:
    """The clock set back by an hour each time it is asked for, in a run that is killed once."""
    dying = partial(signalled, "evaluation", signal.SIGKILL)
    first = Attempt(sweep("r", *ONE), place, quick, setting_the_clock_back, dying)
    assert first.status() == -signal.SIGKILL
    again = Attempt(sweep("r", *ONE), place, quick, setting_the_clock_back)
    assert again.status() == 0, again.err
    (record,) = Run(place / "r").records(thorough=True)
    assert record.figures["train_seconds"] >= 0
    assert contents(place / "r") == undisturbed  # which has no negative seconds, in the right order
    counted["cells compared"] += 1
