"""Slurm's executor, with what submitit has in Slurm's stead: ``make cluster-test``."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pandas as pd
import psutil
import pytest

from bench.executors import Needs
from bench.store import Run
from tests.bench.conftest import QUICK
from tests.bench.test_executors import bits

pytest.importorskip("submitit", reason="submitit is not installed: pip install '.[slurm]'")

from bench.executors.slurm import Slurm

ALGORITHMS = "maml,reptile,raising,diverging"


@pytest.fixture
def hired(monkeypatch: pytest.MonkeyPatch):
    def hire(cluster: str, **terms) -> Slurm:
        crew = Slurm(2, Needs(), cluster=cluster, **terms)
        monkeypatch.setattr("bench.executors.hire", lambda *_, **__: crew)
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
        return crew

    return hire


@pytest.mark.parametrize("cluster", ["debug", "local"])
def test_jobs_do_what_one_process_does(
    bench, tmp_path: Path, unmeasured, hired, cluster: str
) -> None:
    asked = ("run", *QUICK, "--algos", ALGORITHMS, "--cell-cpus", "1")
    assert bench(*asked, "--out", "by-one")[0] == 1
    hired(cluster)
    status, out, _ = bench(*asked, "--out", "r")
    assert status == 1, out
    assert len(bits(tmp_path / "r")) == 6
    assert bits(tmp_path / "r") == bits(tmp_path / "by-one")
    summary = pd.read_csv(tmp_path / "r" / "summary.csv").set_index("algorithm")
    assert summary["status"].to_dict() == {
        "maml": "complete",
        "reptile": "complete",
        "raising": "failed",
        "diverging": "diverged",
    }
    assert not (tmp_path / "r" / ".workers").exists()


def test_a_job_that_dies_again_and_again(bench, tmp_path: Path, unmeasured, hired) -> None:
    hired("local")
    status, out, _ = bench("run", *QUICK, "--algos", "dying,maml", "--out", "r")
    assert status == 1, out
    run = Run(tmp_path / "r")
    assert [record.cell.algorithm for record in run.records()] == ["maml"]
    (failure,) = run.failures().values()
    assert "lost 3 times" in failure["reason"]


def test_a_job_that_hangs(bench, tmp_path: Path, unmeasured, hired) -> None:
    hired("local", cell_timeout=5.0)
    status, out, _ = bench("run", *QUICK, "--algos", "hanging", "--out", "r")
    assert status == 1, out
    assert "it took more than 5 s (--cell-timeout)" in out


def test_interrupted_jobs_write_their_checkpoints_and_go_on(
    bench, tmp_path: Path, unmeasured, hired, monkeypatch
) -> None:
    asked = ("run", *QUICK, "--algos", "dawdling", "--iterations", "60", "--seeds", "0,1")
    monkeypatch.setattr("bench.dispatch.GRACE_SECONDS", 240.0)
    crew = hired("local")
    events = crew.events

    def interrupted_once_both_are_at_work(seconds: float):
        if len(list((tmp_path / "r" / ".workers").glob("*.lock"))) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            monkeypatch.setattr(crew, "events", events)
        return events(seconds)

    monkeypatch.setattr(crew, "events", interrupted_once_both_are_at_work)
    assert bench(*asked, "--out", "r")[0] == 130
    assert len(list((tmp_path / "r" / "cells").glob(".*/training.safetensors"))) == 2
    assert not [p for p in psutil.Process().children(recursive=True) if "submitit" in str(p)]
    hired("local")
    assert bench(*asked, "--out", "r")[0] == 0
    assert bench(*asked, "--out", "by-one")[0] == 0
    assert bits(tmp_path / "r") == bits(tmp_path / "by-one")
