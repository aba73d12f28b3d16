"""A Ray cluster of several nodes on this machine, one of which is killed: ``make cluster-test``."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.progress import Display
from bench.store import Run
from bench.sweep import Cell
from tests.bench.conftest import QUICK
from tests.bench.test_executors import bits

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")

ITERATIONS = 300
"""Of 0.05 s at least: longer than the 10 s between checkpoints."""
CELLS = (*QUICK, "--iterations", str(ITERATIONS), "--algos", "dawdling", "--seeds", "0,1,2,3")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    from ray.cluster_utils import Cluster

    # Not to be judged by what else this machine holds in its memory and does.
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def killed(node) -> None:
    """End a node as a machine ends that loses its power."""
    for kind in ("raylet", "log_monitor", "dashboard_agent", "runtime_env_agent"):
        for info in node.all_processes.get(kind, []):
            os.kill(info.process.pid, signal.SIGKILL)


def test_a_node_killed_in_mid_cell_costs_its_cells_what_they_did_since_their_checkpoints(
    bench, tmp_path: Path, unmeasured, monkeypatch, cluster
) -> None:
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    victim = nodes[0].node_id[:6]
    where: dict[str, list[str]] = {}
    furthest: dict[str, int] = {}
    resumed: dict[str, int] = {}
    gone: list[str] = []

    class Watching(Display):
        def began(self, cell: Cell, place: str) -> None:
            super().began(cell, place)
            where.setdefault(cell.id, []).append(place)

        def moved(self, cell: Cell, stage: str, done: int, total: int, note: str) -> None:
            super().moved(cell, stage, done, total, note)
            if stage != "training" or not done:
                return
            if len(where[cell.id]) > 1:
                resumed.setdefault(cell.id, done)
            furthest[cell.id] = max(done, furthest.get(cell.id, 0))
            if victim in where[cell.id][-1] and done > 0.8 * ITERATIONS and not gone:
                gone.append(cell.id)
                killed(nodes[0])

    monkeypatch.setattr("bench.progress.Display", Watching)
    asked = ("run", *CELLS, "--executor", "ray", "--address", cluster.address, "--out", "r")
    status, out, err = bench(*asked)
    assert (status, err) == (0, ""), out
    (lost,) = gone
    assert len(where[lost]) == 2
    assert victim not in where[lost][1]
    assert out.count("goes on from its checkpoint") == 1
    assert resumed[lost] > 50  # from the checkpoint that it had sent, not from the beginning
    records = Run(tmp_path / "r").records()
    assert sorted(record.cell.seed for record in records) == [0, 1, 2, 3]
    found = bits(tmp_path / "r")
    (tmp_path / "r").rename(tmp_path / "by-ray")
    assert bench("run", *CELLS, "--jobs", "4", "--cell-cpus", "1", "--out", "r")[0] == 0
    assert bits(tmp_path / "r") == found


def test_faults_on_a_cluster_are_noted(bench, tmp_path: Path, unmeasured, cluster) -> None:
    cluster.add_node(num_cpus=2)
    by_ray = ("--executor", "ray", "--address", cluster.address)
    algorithms = "maml,raising,dying,diverging"
    status, out, _ = bench("run", *QUICK, "--algos", algorithms, *by_ray, "--out", "r")
    assert status == 1, out
    run = Run(tmp_path / "r")
    assert [record.cell.algorithm for record in run.records()] == ["maml"]
    reasons = {f["settings"]["algorithm"]: f["reason"] for f in run.failures().values()}
    assert reasons.keys() == {"raising", "dying", "diverging"}
    assert "no such key" in reasons["raising"]
    assert "lost 3 times" in reasons["dying"]
    assert "diverged: the loss is nan at iteration 1" in reasons["diverging"]
    ray.shutdown()
    hanging = ("run", *QUICK, "--algos", "hanging", "--cell-timeout", "5", "--out", "hung")
    status, out, _ = bench(*hanging, *by_ray)
    assert status == 1
    assert "it took more than 5 s (--cell-timeout)" in out


def test_interrupted_tasks_send_their_checkpoints_and_go_on(
    bench, tmp_path: Path, unmeasured, monkeypatch, cluster
) -> None:
    monkeypatch.setattr("bench.dispatch.GRACE_SECONDS", 240.0)
    cluster.add_node(num_cpus=1)
    asked = ("run", *QUICK, "--algos", "dawdling", "--iterations", "60", "--seeds", "0,1,2")
    at_work: set[str] = set()

    class Interrupting(Display):
        def moved(self, cell: Cell, stage: str, done: int, total: int, note: str) -> None:
            at_work.update([cell.id] if done else [])
            if len(at_work) == 2:
                os.kill(os.getpid(), signal.SIGINT)
                at_work.add("only once")

    monkeypatch.setattr("bench.progress.Display", Interrupting)
    by_ray = ("--executor", "ray", "--address", cluster.address, "--out", "r")
    status, out, _ = bench(*asked, *by_ray)
    assert status == 130, out
    cells = tmp_path / "r" / "cells"
    assert len(list(cells.glob(".*/training.safetensors"))) == 2
    monkeypatch.setattr("bench.progress.Display", Display)
    assert bench(*asked, *by_ray)[0] == 0
    assert bench(*asked, "--jobs", "3", "--cell-cpus", "1", "--out", "by-local")[0] == 0
    assert len(bits(tmp_path / "r")) == 9
    assert bits(tmp_path / "r") == bits(tmp_path / "by-local")


def test_a_cluster_without_room_for_a_cell_is_refused(bench, tmp_path: Path, cluster) -> None:
    asked = ("run", *QUICK, "--algos", "maml", "--executor", "ray", "--address", cluster.address)
    status, _, err = bench(*asked, "--cell-cpus", "64")
    assert (status, err.count("\n")) == (2, 1)
    assert "no node of the Ray cluster has 64 CPU, which maml tiny" in err
    ray.shutdown()
    status, _, err = bench(*asked, "--cell-memory", "100000")
    assert status == 2
    assert "memory" in err
    assert not (tmp_path / "results").exists()
