"""Disks that are full, that cannot be written, and that give back what was not written."""

from __future__ import annotations

import random
import re
import signal
import subprocess
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.checkpoints import read_tensors, write_tensors
from bench.errors import DamagedError
from bench.store import FILES, RECORD, Run
from tests.chaos.attempts import PLACES, Attempt, contents, fill, filling, quick, signalled, sweep
from tests.chaos.conftest import ONE


def test_a_full_disk(
    disk: Path, whole: bool, undisturbed: dict[str, Any], counted: Counter[str]
) -> None:
    """A disk that is full from some stage of a run on; then there is space, and it goes on."""
    stages = ["starting", *PLACES] if whole else ["starting", "checkpoint", "completing"]
    for stage in stages:
        if stage == "starting":
            fill(disk)
        prepare = partial(filling, stage, disk) if stage in PLACES else quick
        attempt = Attempt(sweep(stage, *ONE), disk, quick, prepare)
        assert attempt.status() == (2 if stage == "starting" else 1), attempt.out
        assert re.match(f"bench: cannot write (to )?{stage}[:/]", attempt.err), attempt.err
        assert attempt.err.count("\n") == 1
        assert "No space left on device" in attempt.err
        counted["stages"] += 1
        (disk / "filler").unlink()
        again = Attempt(sweep(stage, *ONE), disk, quick)
        assert again.status() == 0, again.err
        assert contents(disk / stage) == undisturbed
        counted["cells compared"] += 1
        subprocess.run(["rm", "-r", disk / stage], check=True)


def test_a_read_only_disk(disk: Path, counted: Counter[str]) -> None:
    """A disk that became read-only: what reads goes on, what writes says so."""
    asked = ("--algos", "maml,reptile", "--iterations", "3")
    assert Attempt(sweep("r", *asked), disk, quick).status() == 0
    expected = contents(disk / "r")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for command in (sweep("r", *asked), sweep("s", *asked), ("compare", "r"), ("report", "r")):
        attempt = Attempt(command, disk, quick)
        assert attempt.status() == 2
        assert re.fullmatch("bench: cannot write to .: Read-only file system\n", attempt.err)
        counted["commands refused"] += 1
    check = Attempt(("check", "r", "--baseline", "r"), disk, quick)
    assert check.status() == 0, check.err
    counted["commands that go on"] += 1
    assert contents(disk / "r") == expected


def flipped(path: Path, chance: random.Random) -> str:
    """Flip one bit of a file; which."""
    contents = bytearray(path.read_bytes())
    place, bit = chance.randrange(len(contents)), chance.randrange(8)
    contents[place] ^= 1 << bit
    path.write_bytes(contents)
    return f"bit {bit} of byte {place} of {path.name}"


def cut(path: Path, chance: random.Random) -> str:
    """Cut a file short; where."""
    contents = path.read_bytes()
    left = chance.randrange(len(contents))
    path.write_bytes(contents[:left])
    return f"{path.name} cut to {left} bytes"


@pytest.fixture
def finished(place: Path) -> Run:
    """A run that has come to its end."""
    assert Attempt(sweep("r", *ONE), place, quick).status() == 0
    return Run(place / "r")


def test_every_damage_to_a_cell_is_found(finished: Run, whole: bool, counted: Counter[str]) -> None:
    """A file of a finished cell with a flipped bit, or cut short, at random places."""
    (record,) = finished.records()
    chance = random.Random(0)
    for name in (RECORD, *FILES):
        path = finished.cells / record.cell.id / name
        before = path.read_bytes()
        for number in range(500 if whole else 20):
            done = (flipped, cut)[number % 2](path, chance)
            counted["faults injected"] += 1
            with pytest.raises(DamagedError):
                finished.sound(record.cell.id)
            assert finished.record(record.cell.id, thorough=True) is None, done
            if name.endswith(".parquet"):
                with pytest.raises(DamagedError):
                    finished.table(record.cell, name)
            counted["found"] += 1
            path.write_bytes(before)
            assert finished.record(record.cell.id, thorough=True) == record


def test_damaged_cells_are_named_and_made_again(place: Path, counted: Counter[str]) -> None:
    """Damaged cells of a sweep, which report, compare and check name, and run makes again."""
    arguments = sweep("r", "--algos", "maml,reptile", "--seeds", "0,1,2", "--iterations", "3")
    assert Attempt(arguments, place, quick).status() == 0
    subprocess.run(["cp", "-r", place / "r", place / "before"], check=True)
    expected = contents(place / "before")
    run, chance = Run(place / "r"), random.Random(0)
    by_name = {(r.cell.algorithm, r.cell.seed): r.cell.id for r in run.records()}
    for harm, cell, name in (
        (cut, ("maml", 0), "episodes.parquet"),
        (flipped, ("reptile", 0), "checkpoint.safetensors"),
        (flipped, ("maml", 1), "cell.json"),
    ):
        harm(run.cells / by_name[cell] / name, chance)
        counted["faults injected"] += 1
    damaged = {by_name[cell] for cell in (("maml", 0), ("reptile", 0), ("maml", 1))}
    commands = {
        ("compare", "r"): 0,
        ("check", "r", "--baseline", "before"): 1,  # for cells of the baseline are not there
        ("report", "r"): 0,
    }
    for command, status in commands.items():
        attempt = Attempt(command, place, quick)
        assert attempt.status() == status, attempt.err
        told = (place / "r" / "report.md").read_text() if command[0] == "report" else attempt.out
        assert {cell_id for cell_id in by_name.values() if cell_id in told} == damaged, told
        counted["commands that named them"] += 1
    again = Attempt(arguments, place, quick)
    assert again.status() == 0, again.err
    assert "3 of 6 cells are done already" in again.out
    assert again.out.count("is damaged") == 3
    assert contents(place / "r") == expected
    counted["cells made again"] += 3


def test_damage_to_a_cell_in_progress_is_found(
    place: Path, whole: bool, undisturbed: dict[str, Any], counted: Counter[str]
) -> None:
    """A run killed before it measured, and a file in its workplace with a flipped bit or cut."""
    chance = random.Random(0)
    dying = partial(signalled, "measuring", signal.SIGKILL)
    assert Attempt(sweep("r", *ONE), place, quick, dying).status() == -signal.SIGKILL
    (workplace,) = (place / "r" / "cells").iterdir()
    names = sorted(path.name for path in workplace.iterdir())
    subprocess.run(["mv", place / "r", place / "killed"], check=True)
    for name in names if whole else ["checkpoint.safetensors"]:
        for harm in (flipped, cut) if whole else (flipped,):
            subprocess.run(["cp", "-r", place / "killed", place / "r"], check=True)
            harm(place / "r" / "cells" / workplace.name / name, chance)
            counted["faults injected"] += 1
            assert Attempt(sweep("r", *ONE), place, quick).status() == 0
            assert contents(place / "r") == undisturbed
            counted["cells compared"] += 1
            subprocess.run(["rm", "-r", place / "r"], check=True)


def test_a_damaged_training_checkpoint_is_not_gone_on_from(
    tmp_path: Path, whole: bool, counted: Counter[str]
) -> None:
    """A training's checkpoint with a flipped bit, or cut short, at random places."""
    path, chance = tmp_path / "training.safetensors", random.Random(0)
    tensors = {"model/weight": torch.rand(3, 5), "log/loss": torch.rand(7, dtype=torch.float64)}
    tensors |= {"log/val": torch.zeros(0), "optimizer/step": torch.tensor(3)}
    write_tensors(tensors, path, cell="a cell", source="a source")
    before = path.read_bytes()
    for number in range(5_000 if whole else 200):
        done = (flipped, cut)[number % 2](path, chance)
        counted["faults injected"] += 1
        with suppress(OSError, ValueError):  # what a training takes for no checkpoint at all
            found = read_tensors(path, cell="a cell", source="a source")
            assert found.keys() == tensors.keys(), done
            assert all(torch.equal(found[name], tensors[name]) for name in tensors), done
            counted["of them without effect, between the header's words"] += 1
        path.write_bytes(before)
    assert read_tensors(path, cell="a cell", source="a source").keys() == tensors.keys()
