"""Processes that share a training do what one does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch

from bench.distributed import ALONE, Team
from bench.store import Run
from tests.bench.conftest import QUICK

ROOT = Path(__file__).resolve().parents[2]


def begin(processes: int, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [sys.executable, *(launch if processes > 1 else []), *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start(processes: int, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    process = begin(processes, *arguments, cwd=cwd)
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.parametrize(("count", "size"), [(8, 3), (5, 2), (2, 4), (1, 1)])
def test_the_parts_of_all_are_the_whole_in_order(count: int, size: int) -> None:
    parts = []
    for rank in range(size):
        team = Team()
        team.rank, team.size = rank, size
        parts += team.part(range(10, 10 + count))
    assert parts == list(range(10, 10 + count))


def test_one_process_is_a_team(tmp_path: Path) -> None:
    assert ALONE.part(range(3, 7)) == range(3, 7)
    assert ALONE.told("word") == "word"


def test_two_processes_have_the_gradient_of_one(tmp_path: Path) -> None:
    cases = ("maml-running", "anil-transductive", "reptile-transductive")
    found = []
    for processes in (1, 2):
        target = tmp_path / f"{processes}.pt"
        script = str(Path(__file__).with_name("gradient_of_a_team.py"))
        done = start(processes, script, str(target), *cases, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found.append(torch.load(target, weights_only=True))
    for case in cases:
        one, two = (each[case] for each in found)
        torch.testing.assert_close(two, one, rtol=1e-12, atol=1e-14)


def test_a_sweep_by_two_processes_equals_that_by_one_and_ends_once(tmp_path: Path) -> None:
    sweep = ("-m", "bench", "run", "--algos", "maml,diverging", *QUICK, "--meta-batch", "3")
    for processes in (1, 2):
        # What one process measures has tests of its own.
        costs = ("--costs", "alone" if processes > 1 else "never")
        done = start(processes, *sweep, *costs, "--out", f"by-{processes}", cwd=tmp_path)
        assert "the loss is nan at iteration 1" in done.stdout
        assert done.stdout.count("± is the 95% interval") == 1
    one, two = (Run(tmp_path / f"by-{n}") for n in (1, 2))
    (cell,) = (record.cell for record in one.records())
    assert [record.cell for record in two.records()] == [cell]
    losses = [
        pd.read_parquet(run.cells / cell.id / "training.parquet")["loss"] for run in (one, two)
    ]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=1e-6)
    # Rounding can put a sample on the other side of a kink, and its episode with it.
    here, there = (run.scores(cell)["loss"] for run in (one, two))
    assert ((here - there).abs() < 1e-3).mean() > 0.8


def test_a_team_that_is_interrupted_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Only its leader hears of it, and all stop after the same iteration."""
    asked = ("-m", "bench", "run", "--algos", "dawdling", *QUICK, "--iterations", "40")
    asked += ("--costs", "never")
    assert start(2, *asked, "--out", "whole", cwd=tmp_path).returncode == 0
    cut = begin(2, *asked, "--out", "cut", cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "cut").glob("cells/.*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    (leader,) = (
        process
        for process in psutil.Process(cut.pid).children()
        if process.environ().get("RANK") == "0"
    )
    leader.send_signal(signal.SIGINT)
    out, _ = cut.communicate(timeout=120)
    assert cut.returncode != 0
    assert "the same command goes on from here" in out
    run = Run(tmp_path / "cut")
    assert run.records() == []
    assert list(run.cells.glob(".*/training.safetensors"))
    done = start(2, *asked, "--out", "cut", cwd=tmp_path)
    assert done.returncode == 0
    (cell,) = (record.cell for record in run.records())
    for name in ("episodes.parquet", "checkpoint.safetensors"):
        files = [tmp_path / out / "cells" / cell.id / name for out in ("whole", "cut")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_what_processes_cannot_share_is_said_once(tmp_path: Path) -> None:
    sweep = ("-m", "bench", "run", "--algos", "maml", *QUICK, "--meta-batch", "1")
    done = start(2, *sweep, cwd=tmp_path)
    said = [line for line in done.stderr.splitlines() if line.startswith("bench:")]
    assert said == [
        "bench: 2 processes cannot share a meta-batch of 1 tasks; start fewer, or give "
        "--meta-batch 2"
    ]
    assert not (tmp_path / "results").exists()
