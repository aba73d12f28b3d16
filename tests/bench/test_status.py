"""Where a run stands, told from its folder alone."""

import fcntl
import os
import time
from pathlib import Path
from threading import Timer

import numpy as np
import pytest

from bench import status
from bench.errors import BenchError
from bench.store import Run
from bench.sweep import Cell, Sweep
from bench.training import train
from datasets import get
from tests.bench.conftest import TINY
from tests.performance.synthetic_run import write_cell

SWEEP = Sweep(algos="maml,fomaml", seeds="0,1,2,3", devices="cpu", episodes=20)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that has been started and stopped, without a cell."""
    run = Run(tmp_path / "r")
    run.start(SWEEP).release()
    return run


def of(algorithm: str, sweep: Sweep = SWEEP) -> list[Cell]:
    return [cell for cell in sweep.cells() if cell.algorithm == algorithm]


def finish(run: Run, cells: list[Cell]) -> None:
    for cell in cells:
        write_cell(run, cell, "source", "session")


def test_what_is_done_failed_and_left_adds_up_to_the_sweep(bench, run: Run) -> None:
    maml = of("maml")
    finish(run, maml[:3])
    run.fail(maml[3], "diverged: the loss is nan at iteration 7")
    code, out, err = bench("status", "r")
    assert (code, err) == (status.STOPPED, "")
    assert "no process holds it: stopped" in out
    assert "done       3 of 8\n" in out
    assert "failed     1\n  maml glyphs 5-way 1-shot seed 3: diverged: the loss is nan at it" in out
    assert "left       4\n" in out


def test_the_exit_status_tells_a_script_what_to_do(bench, run: Run) -> None:
    cells = SWEEP.cells()
    finish(run, cells[1:])
    assert bench("status", "r")[0] == status.STOPPED
    with run.start(SWEEP):
        assert bench("status", "r")[0] == status.RUNNING
    run.fail(cells[0], "out of memory")
    assert bench("status", "r")[0] == status.FAILED
    finish(run, cells[:1])
    code, out, _ = bench("status", "r")
    assert code == status.COMPLETE
    assert "failed     0" in out
    assert "ends" not in out


def test_what_failed_or_is_not_asked_for_is_not_half_done(bench, run: Run) -> None:
    cells = SWEEP.cells()
    finish(run, cells[1:])
    run.workplace(cells[0])
    assert bench("status", "r")[0] == status.STOPPED
    run.fail(cells[0], "out of memory")
    code, out, _ = bench("status", "r")
    assert code == status.FAILED
    assert "half done  0\n" in out
    finish(run, cells[:1])
    run.workplace(cells[0].model_copy(update={"seed": 77}))
    code, out, _ = bench("status", "r")
    assert code == status.COMPLETE
    assert "half done  0; 1 more, which the sweep does not ask for" in out


def test_it_writes_nothing(run: Run) -> None:
    finish(run, SWEEP.cells()[:2])

    def everything() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}

    before = everything()
    list(status.read(run.folder).lines())
    assert everything() == before


@pytest.mark.parametrize("listed", [True, False])
def test_the_process_that_holds_the_folder_is_told(run: Run, monkeypatch, listed: bool) -> None:
    lock = run.folder / ".lock"
    if not listed:  # as by a process of another machine
        monkeypatch.setattr(status, "_locker", lambda inode: None)
    assert status.holder(lock) is None
    with run.start(SWEEP):
        found = status.holder(lock)
        assert found is not None
        if listed and Path("/proc/locks").exists():
            assert found.pid == os.getpid()
            assert found.since is not None
            assert found.since < time.time()
    assert status.holder(lock) is None


def test_a_look_at_who_is_there_keeps_no_run_out(run: Run) -> None:
    with (run.folder / ".lock").open("rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        with pytest.raises(BenchError, match="in use by another run"):
            run.start(SWEEP)
        Timer(0.1, fcntl.flock, (looking, fcntl.LOCK_UN)).start()
        run.start(SWEEP).release()


def test_a_cell_underway_tells_its_iteration_and_the_age_of_its_checkpoint(
    bench, tmp_path: Path, cell: Cell
) -> None:
    sweep = Sweep(algos="maml", datasets="tiny", devices="cpu", plugin=TINY, **{"set": asked(cell)})
    run = Run(tmp_path / "r")
    run.start(sweep).release()
    assert [one.id for one in sweep.cells()] == [cell.id]
    checkpoint = run.workplace(cell) / "training.safetensors"
    assert "begun; no checkpoint yet" in bench("status", "r")[1]
    stops = iter([False] * 11 + [True])
    source = get("tiny")().load("train")
    with pytest.raises(KeyboardInterrupt):
        train(cell, source, None, checkpoint, interrupted=lambda: next(stops))
    os.utime(checkpoint, (time.time() - 200,) * 2)
    code, out, _ = bench("status", "r")
    assert code == status.STOPPED
    assert "half done  1\n" in out
    assert "iteration 12 of 30; its checkpoint is 3 min 20 s old" in out
    checkpoint.write_bytes(b"cut short")
    assert "no checkpoint yet" in bench("status", "r")[1]
    (run.workplace(cell) / "checkpoint.safetensors").touch()
    assert "trained; being tested" in bench("status", "r")[1]
    (run.workplace(cell) / "trained.json").touch()
    assert "trained and tested" in bench("status", "r")[1]


def asked(cell: Cell) -> dict[str, list[object]]:
    """What the fixture's cell was asked for with."""
    names = ("model", "iterations", "meta_batch", "episodes", "val_episodes", "val_every")
    return {name: [getattr(cell, name)] for name in (*names, "eval_steps")}


def paced(run: Run, cells: list[Cell], seconds: float) -> None:
    """Cells made one after another, each in so many seconds, the last of them just now."""
    finish(run, cells)
    now = time.time()
    for index, cell in enumerate(reversed(cells)):
        os.utime(run.cells / cell.id / "cell.json", (now - seconds * index,) * 2)
    began = now - seconds * len(cells)
    os.utime(run.folder / "environment.json", (began,) * 2)


def test_the_end_is_where_finished_cells_of_like_kind_put_it(run: Run) -> None:
    maml, fomaml = of("maml"), of("fomaml")
    paced(run, [*maml[:3], *fomaml[:2]], 100.0)
    found = status.read(run.folder)
    assert found.ends == pytest.approx(300, rel=0.05)  # a cell of maml, two of fomaml
    assert found.because.startswith("from 5 finished cells of like kind, at the pace since")
    # What is trained and tested of a cell is not to be done again.
    (run.workplace(maml[3]) / "trained.json").touch()
    assert status.read(run.folder).ends == pytest.approx(209, rel=0.05)


def test_what_a_cell_cost_before_the_run_was_started_again_is_not_paced(run: Run) -> None:
    maml, fomaml = of("maml"), of("fomaml")
    cells = [*maml[:3], *fomaml[:3]]
    finish(run, cells)
    seconds = float(np.mean([sum(status.costs(record) or ()) for record in run.records()]))
    paced(run, cells, seconds)
    whole = status.read(run.folder).ends
    assert whole == pytest.approx(2 * seconds, rel=0.1)
    made = run.folder / "environment.json"
    began = made.stat().st_mtime + 0.9 * seconds  # of the first cell a tenth was left
    os.utime(made, (began,) * 2)
    assert status.read(run.folder).ends == pytest.approx(whole, rel=0.1)


def test_a_swept_step_size_is_of_like_kind_and_a_swept_number_of_steps_is_not(
    tmp_path: Path,
) -> None:
    for name, values, known in (
        ("inner_lr", "0.1,0.2,0.3,0.4", True),
        ("inner_steps", "1,2,3,4", False),
    ):
        sweep = Sweep(algos="maml", devices="cpu", episodes=20, **{"set": {name: values}})
        run = Run(tmp_path / name)
        run.start(sweep).release()
        paced(run, sweep.cells()[:3], 100.0)
        found = status.read(run.folder)
        assert (found.ends is not None) == known
        assert known or found.because == "no finished cell is like 1 of those to come"


def test_no_estimate_stands_on_sand(run: Run) -> None:
    maml, fomaml = of("maml"), of("fomaml")
    paced(run, maml, 100.0)
    assert status.read(run.folder).because == "no finished cell is like 4 of those to come"
    paced(run, fomaml[:2], 100.0)
    for cell in maml:  # made before the run was started again
        os.utime(run.cells / cell.id / "cell.json", (0, 0))
    assert status.read(run.folder).because.startswith("fewer than 3 cells were finished since")
    paced(run, [*maml, *fomaml[:2]], 1e-6)
    assert "was the folder copied?" in status.read(run.folder).because


def test_cells_of_a_plugin_that_is_not_loaded_are_counted_at_most(
    bench, tmp_path: Path, monkeypatch
) -> None:
    sweep = Sweep(algos="absent", seeds="0,1", devices="cpu", plugin=Path("absent.py"))
    run = Run(tmp_path / "r")
    run.start(sweep).release()
    code, out, _ = bench("status", "r")
    assert code == status.STOPPED
    assert "done       0 of at most 2\n" in out
    assert "left       at most 2\n" in out
    assert "--plugin" in out


def test_a_damaged_cell_is_named_and_counts_as_left(bench, run: Run) -> None:
    cells = SWEEP.cells()
    finish(run, cells)
    (run.cells / cells[0].id / "cell.json").write_text("{")
    code, out, _ = bench("status", "r")
    assert code == status.STOPPED
    assert "done       7 of 8" in out
    assert f"damaged    1; the same 'run' makes them again\n  cells/{cells[0].id}" in out


def test_a_folder_that_holds_no_run_ends_in_one_line(bench, run: Run) -> None:
    for folder, said in (("absent", "there is no run in absent"), (".", "there are runs in it: r")):
        code, out, err = bench("status", folder)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert said in err
    (run.folder / "sweep.toml").write_text("algos = [")
    code, _, err = bench("status", "r")
    assert (code, err.count("\n")) == (2, 1)
    assert "is not a TOML file" in err
    with pytest.raises(BenchError):
        status.read(run.cells)
