"""Cells made by other processes: each exactly once, whatever becomes of the processes."""

from __future__ import annotations

import itertools
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from rich.console import Console

import datasets
from bench import dispatch, measure
from bench.errors import BenchError, StorageError
from bench.executors import Began, Crew, Ended, Event, Job, Kit, Lost, Moved, Needs, hire, parcel
from bench.executors.local import Local, _gpu
from bench.executors.worker import Telling, make
from bench.failures import Failure
from bench.making import Sources
from bench.progress import Display
from bench.store import Run
from bench.sweep import Cell, Sweep
from tests.bench.conftest import QUICK, TINY
from tests.bench.test_cli import start

ASKED = ("run", *QUICK, "--out", "r", "--algos")


def bits(folder: Path) -> dict[str, bytes]:
    """What a run's cells came to, without times."""
    found = {}
    for cell_id in Run(folder).cell_ids():
        for name in ("episodes.parquet", "checkpoint.safetensors"):
            found[f"{cell_id}/{name}"] = (folder / "cells" / cell_id / name).read_bytes()
        log = pd.read_parquet(folder / "cells" / cell_id / "training.parquet")
        found[f"{cell_id}/log"] = log.drop(columns="seconds").to_numpy().tobytes()
    return found


# What is handed out and taken back, without processes.


ENDS = itertools.repeat("ends")


class Scripted(Crew):
    """A crew that does what a script says: for each cell, what happens at each try."""

    name = "scripted"

    def __init__(self, script: dict[str, Sequence[str]], jobs: int | None = None, **terms) -> None:
        super().__init__(jobs, Needs(), **terms)
        self.script = {
            algorithm: itertools.chain(tries, ENDS) for algorithm, tries in script.items()
        }
        self.held: dict[str, Job] = {}
        self.most = 0
        self.began: list[str] = []
        self.killed: list[str] = []
        self.interrupted = False

    def begin(self, kit: Kit) -> None: ...

    def submit(self, jobs: Sequence[Job]) -> None:
        self.held |= {job.cell.id: job for job in jobs}
        self.most = max(self.most, len(self.held))

    def events(self, seconds: float) -> list[Event]:
        if not self.held:
            return []
        job = self.held[next(iter(self.held))]
        cell, happens = job.cell, next(self.script.get(job.cell.algorithm, ENDS))
        self.began.append(cell.algorithm)
        events: list[Event] = [Began(cell.id, "here"), Moved(cell.id, "training", 1, 2)]
        if happens == "hangs":
            self.held[cell.id] = self.held.pop(cell.id)  # the others have their turns
            return events
        del self.held[cell.id]
        outcomes = {
            "ends": Ended(cell.id, {"mean": 1.0}),
            "fails": Ended(cell.id, Failure("it fails", "it fails")),
            "is interrupted": Ended(cell.id, None),
            "is lost": Lost(cell.id, "it is gone"),
            "fills the disk": Ended(cell.id, StorageError(28, "No space left on device", "r")),
        }
        return [*events, outcomes[happens]]

    def kill(self, cell_id: str) -> None:
        self.killed.append(self.held.pop(cell_id).cell.algorithm)

    def interrupt(self) -> None:
        self.interrupted = True

    def end(self) -> None: ...


ALGORITHMS = ["maml", "fomaml", "anil", "reptile"]


def handed_out(
    crew: Crew,
    interrupted: Callable[[], bool] = lambda: False,
    found: list[tuple[str, str]] | None = None,
) -> list[tuple[str, str]]:
    """What the cells of :data:`ALGORITHMS` came to, in order."""
    cells = Sweep(algos=ALGORITHMS, datasets=["tiny"], devices=["cpu"]).cells()
    display = Display(Console(quiet=True))
    display.begin(cells, 0)
    jobs = [Job(cell, Path(), "source") for cell in cells]
    found = [] if found is None else found
    for cell, outcome in dispatch.dispatch(crew, jobs, display, interrupted):
        line = outcome.line if isinstance(outcome, Failure) else "complete"
        found.append((cell.algorithm, line))
    return found


@pytest.mark.parametrize("jobs", [1, 2, None])
def test_every_cell_comes_back_once_and_no_more_are_out_than_may_be(jobs: int | None) -> None:
    crew = Scripted({"maml": ["is lost", "ends"], "anil": ["fails"]}, jobs)
    found = handed_out(crew)
    assert sorted(found) == [
        ("anil", "it fails"),
        ("fomaml", "complete"),
        ("maml", "complete"),
        ("reptile", "complete"),
    ]
    assert crew.most == (jobs or 4)


def test_a_cell_whose_process_is_lost_again_and_again_has_failed() -> None:
    crew = Scripted({"maml": itertools.repeat("is lost"), "anil": ["is lost", "is interrupted"]}, 1)
    assert handed_out(crew) == [
        ("maml", "its process was lost 3 times; the last time, it is gone"),
        ("fomaml", "complete"),
        ("anil", "complete"),
        ("reptile", "complete"),
    ]
    assert crew.began.count("maml") == crew.began.count("anil") == 3


def test_a_cell_that_takes_too_long_is_ended_and_the_others_go_on(monkeypatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr("bench.dispatch.time.monotonic", lambda: float(next(clock)))
    crew = Scripted({"maml": itertools.repeat("hangs")}, 2, cell_timeout=40.0)
    found = handed_out(crew)
    assert ("maml", "it took more than 40 s (--cell-timeout)") in found
    assert sorted(algorithm for algorithm, _ in found) == sorted(ALGORITHMS)
    assert crew.killed == ["maml"]


def test_once_interrupted_nothing_is_handed_out_and_what_ends_still_counts() -> None:
    crew = Scripted({"fomaml": ["is interrupted"]}, 2)
    asked = iter([False, True])
    found: list[tuple[str, str]] = []
    with pytest.raises(KeyboardInterrupt):
        handed_out(crew, lambda: next(asked, True), found)
    assert crew.interrupted
    assert found == [("maml", "complete")]
    assert set(crew.began) == {"maml", "fomaml"}


def test_what_does_not_end_when_it_is_interrupted_is_not_waited_for(monkeypatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr("bench.dispatch.time.monotonic", lambda: float(next(clock)))
    crew = Scripted({"maml": itertools.repeat("hangs")}, 1)
    with pytest.raises(KeyboardInterrupt):
        handed_out(crew, lambda: len(crew.began) > 2)
    assert crew.interrupted
    assert set(crew.began) == {"maml"}
    assert dispatch.GRACE_SECONDS / 2 < len(crew.began) < 2 * dispatch.GRACE_SECONDS


def test_a_worker_whose_disk_is_full_ends_the_run() -> None:
    with pytest.raises(StorageError, match="No space left"):
        handed_out(Scripted({"fomaml": ["fills the disk"]}))


# A run by a crew, in this process.


class Here(Crew):
    """A crew of one that does its jobs when it is asked what happened."""

    name = "here"

    def begin(self, kit: Kit) -> None:
        self.sources, self.waiting, self.ended = Sources(None, False, kit.sources), [], False

    def submit(self, jobs: Sequence[Job]) -> None:
        self.waiting += jobs

    def events(self, seconds: float) -> list[Event]:
        job = self.waiting.pop(0)
        told: list[Event] = [Began(job.cell.id, "here")]
        watch = Telling(job.cell, told.append)
        outcome = make(job, self.sources, TINY, torch.get_num_threads(), watch, lambda: False)
        return [*told, Ended(job.cell.id, outcome)]

    def kill(self, cell_id: str) -> None: ...

    def interrupt(self) -> None: ...

    def end(self) -> None:
        self.ended = True


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The algorithms that were measured side by side, group by group; none of them really."""
    groups: list[list[str]] = []

    def measure_nothing(cells: Sequence[Cell], *_: object) -> list[pd.DataFrame]:
        for cell in cells:
            if cell.algorithm == "fomaml":
                raise measure.MeasuringError(cell, "the measuring process died")
        groups.append([cell.algorithm for cell in cells])
        frame = pd.DataFrame({"phase": list(measure.PHASES), "seconds": 1.0, "flops": 1.0})
        return [frame.assign(repeat=0, peak_bytes=1) for _ in cells]

    monkeypatch.setattr("bench.measure.measure", measure_nothing)
    return groups


@pytest.mark.parametrize("beside", [False, True])
def test_cells_are_measured_in_their_groups_once_all_are_trained_unless_asked_for_earlier(
    bench, tmp_path: Path, measured, monkeypatch, beside: bool
) -> None:
    asked = ("--costs", "beside") if beside else ()
    crew = Here(None, Needs())
    monkeypatch.setattr("bench.executors.hire", lambda *_, **__: crew)
    before: list[int] = []
    submit = crew.events
    monkeypatch.setattr(crew, "events", lambda s: (before.append(len(measured)), submit(s))[1])
    status, out, _ = bench(*ASKED, "maml,raising,fomaml,reptile", "--shots", "1,2", *asked)
    assert status == 1
    assert crew.ended
    # Neither what failed in training nor what cannot be measured keeps the others from it.
    assert measured == [["maml", "reptile"]] * 2
    assert (before[-1] > 0) == beside
    assert out.count("the measuring process died") == 2
    summary = pd.read_csv(tmp_path / "r" / "summary.csv").set_index("algorithm")
    assert set(summary.loc[["maml", "reptile"], "status"]) == {"complete"}
    assert set(summary.loc[["raising", "fomaml"], "status"]) == {"failed"}


# Data that processes share.


def test_a_source_is_mapped_and_not_copied(tmp_path: Path) -> None:
    source = datasets.get("tiny")().load("train")
    path = tmp_path / "data"
    parcel.write({("tiny", "train"): source}, path)
    here, there = (parcel.read(path)["tiny", "train"] for _ in range(2))
    assert torch.equal(here.samples, source.samples)
    assert here.classes == source.classes
    mapped = [m for m in psutil.Process().memory_maps(grouped=False) if "data.contents" in m.path]
    assert len(mapped) == 2
    here.samples[0] = 0  # a process's own, which neither the file nor another process sees
    assert torch.equal(there.samples, source.samples)
    spec = datasets.EpisodeSpec("tiny", "train", 5, 1, 5, 0)
    for ours, theirs in zip(
        source.batch(spec, [3])["test"], there.batch(spec, [3])["test"], strict=True
    ):
        assert torch.equal(ours, theirs)


def test_what_a_store_of_objects_holds_is_not_copied_either() -> None:
    source = datasets.get("tiny")().load("train")
    head, contents = parcel.pack(source)
    assert len(head) < 4096
    again = parcel.unpack(head, contents)
    addresses = [part.__array_interface__["data"][0] for part in contents]
    assert again.samples.data_ptr() in addresses
    assert np.array_equal(again.samples, source.samples)


# What cannot be asked for.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--address", "head:6379"), "--address is for --executor ray"),
        (("--cell-gpus", "0.5", "--jobs", "2"), "--cell-gpus is for --executor ray and slurm"),
        (("--costs", "beside"), "--costs beside is for --jobs and --executor"),
        (("--jobs", "0"), "--jobs"),
        (("--executor", "cloud"), "'cloud' is not one of"),
        (("--executor", "ray"), "--executor ray needs ray, which is not installed: pip install"),
        (("--executor", "slurm"), "needs submitit, which is not installed: pip install '.[slurm]'"),
    ],
)
def test_what_no_executor_can_do_is_said_in_one_line(
    bench, tmp_path: Path, monkeypatch, arguments: tuple[str, ...], message: str
) -> None:
    for package, executor in (("ray", "ray"), ("submitit", "slurm")):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules, f"bench.executors.{executor}", raising=False)
    status, _, err = bench("run", "--algos", "maml", *QUICK, *arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_processes_have_threads_and_gpus_of_their_own(monkeypatch, cell: Cell) -> None:
    monkeypatch.setattr("bench.executors.local.ALL_THREADS", 12)
    assert [Local(n, Needs()).threads for n in (1, 2, 5, 24)] == [12, 6, 2, 1]
    assert Local(4, Needs(cpus=2)).threads == 2
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    on_gpu = cell.model_copy(update={"device": "cuda:0"})
    Local(2, Needs()).check([on_gpu])
    with pytest.raises(BenchError, match="--jobs 3 gives each process a GPU of its own"):
        Local(3, Needs()).check([on_gpu])
    with pytest.raises(BenchError, match="ask for --devices cuda:0, not cuda:1"):
        Local(2, Needs()).check([cell.model_copy(update={"device": "cuda:1"})])


def test_a_seat_has_the_gpu_of_its_number_among_those_that_may_be_seen(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [_gpu(seat) for seat in range(3)] == ["3", "5", "2"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [_gpu(seat) for seat in range(2)] == ["0", "1"]


def test_cells_in_this_process_have_no_crew() -> None:
    assert hire(None) is None
    assert hire(None, jobs=1, cpus=2) is None
    assert isinstance(hire(None, jobs=2), Local)
    assert isinstance(hire(None, cell_timeout=5.0), Local)


# Processes.


def workers_of(driver: psutil.Process) -> list[psutil.Process]:
    return [child for child in driver.children() if "spawn_main" in " ".join(child.cmdline())]


def test_two_processes_do_what_one_does_whatever_happens_beside(
    bench, tmp_path: Path, unmeasured, monkeypatch
) -> None:
    monkeypatch.setattr("bench.dispatch.TRIES", 2)
    bench(*ASKED, "maml,reptile")
    one = bits(tmp_path / "r")
    (tmp_path / "r").rename(tmp_path / "by-one")
    status, out, _ = bench(*ASKED, "maml,dying,reptile,raising", "--jobs", "2")
    assert status == 1
    assert len(one) == 6
    assert bits(tmp_path / "r") == one
    assert "dying tiny 5-way 1-shot seed 0 goes on from its checkpoint" in out
    reasons = {
        f["settings"]["algorithm"]: f["reason"] for f in Run(tmp_path / "r").failures().values()
    }
    assert reasons.keys() == {"dying", "raising"}
    assert "lost 2 times; the last time, the process was ended by SIGKILL" in reasons["dying"]
    assert "KeyError: 'no such key'" in reasons["raising"]
    assert sorted(path.name for path in (tmp_path / "r").iterdir() if path.name[0] == ".") == [
        ".lock"
    ]


def test_a_cell_that_hangs_is_ended(bench, tmp_path: Path, unmeasured) -> None:
    status, out, _ = bench(*ASKED, "hanging", "--cell-timeout", "2")
    assert status == 1
    assert "hanging tiny 5-way 1-shot seed 0 failed: it took more than 2 s (--cell-timeout)" in out
    assert workers_of(psutil.Process()) == []


def test_an_interrupted_crew_leaves_no_orphans_and_loses_nothing(
    bench, tmp_path: Path, unmeasured, monkeypatch
) -> None:
    asked = (*ASKED, "dawdling", "--iterations", "60", "--seeds", "0,1")
    process = start(*asked, "--jobs", "2", cwd=tmp_path)
    workers: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and process.poll() is None:
            if len(list((tmp_path / "r" / ".workers").glob("*.lock"))) == 2:  # both have begun
                workers = workers_of(psutil.Process(process.pid))
                break
            time.sleep(0.1)
        workers[0].kill()
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 130, out
    assert "the same command goes on from here" in out
    assert psutil.wait_procs(workers, timeout=60)[1] == []
    assert Run(tmp_path / "r").records() == []
    monkeypatch.setenv("MENDED", "dawdling")  # which makes haste, and is the same otherwise
    assert bench(*asked)[0] == 0  # any executor goes on with what another began
    found = bits(tmp_path / "r")
    assert len(found) == 6
    (tmp_path / "r").rename(tmp_path / "cut")
    assert bench(*asked)[0] == 0
    assert bits(tmp_path / "r") == found
