"""A run's folder: whole cells or none."""

import ast
import errno
import json
from pathlib import Path

import pandas as pd
import pytest

import algorithms
import bench
import datasets
from bench.errors import BenchError, StorageError
from bench.files import write_text
from bench.store import DECISIVE, SUMMARY_COLUMNS, Run, source_hash
from bench.sweep import Cell, Sweep

HOME = Path(bench.__file__).parent
FIGURES = {"metric": "accuracy", "mean": 0.5, "ci95": 0.01, "engine": "higher"}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.start(Sweep(devices=["cpu"])).release()
    return run


def finish(run: Run, cell: Cell) -> None:
    workplace = run.workplace(cell)
    for name in ("episodes.parquet", "training.parquet", "checkpoint.safetensors"):
        (workplace / name).write_text("stands for data")
    run.complete(cell, "source", FIGURES)


def test_a_cell_appears_only_when_it_is_complete(run: Run, cell: Cell) -> None:
    workplace = run.workplace(cell)
    assert run.records() == []
    finish(run, cell)
    assert [record.cell for record in run.records()] == [cell]
    assert not workplace.exists()


@pytest.mark.parametrize("name", ["cell.json", "episodes.parquet", "checkpoint.safetensors"])
def test_a_cell_with_a_file_gone_or_empty_does_not_count(run: Run, cell: Cell, name: str) -> None:
    finish(run, cell)
    (run.cells / cell.id / name).write_bytes(b"")
    assert run.record(cell.id) is None
    (run.cells / cell.id / name).unlink()
    assert run.record(cell.id) is None
    finish(run, cell)
    assert run.record(cell.id) is not None


def test_a_cell_whose_settings_were_edited_does_not_count(run: Run, cell: Cell) -> None:
    finish(run, cell)
    path = run.cells / cell.id / "cell.json"
    written = json.loads(path.read_text())
    written["settings"]["seed"] = 7
    path.write_text(json.dumps(written))
    assert run.record(cell.id) is None


def test_the_summary_has_the_contracts_columns_and_leaves_empty_what_was_not_measured(
    run: Run, cell: Cell
) -> None:
    finish(run, cell)
    summary, _ = run.write_summary()
    assert tuple(summary.columns) == SUMMARY_COLUMNS
    row = summary.iloc[0]
    assert (row["algorithm"], row["mean"], row["inner_steps"]) == ("maml", 0.5, 1)
    assert pd.isna(row["peak_memory_bytes"])
    again = pd.read_parquet(run.folder / "summary.parquet")
    assert again["cell_id"].tolist() == [cell.id]
    assert pd.read_csv(run.folder / "summary.csv")["cell_id"].tolist() == [cell.id]


def test_a_failure_is_noted_and_forgotten_once_the_cell_is_complete(run: Run, cell: Cell) -> None:
    run.fail(cell, "it raised")
    assert run.summary()["status"].tolist() == ["failed"]
    assert run.left_out() == ["maml tiny 5-way 1-shot seed 0 (failed)"]
    run.fail(cell, "diverged", 7)
    assert run.summary()[["status", "diverged_at"]].values.tolist() == [["diverged", 7]]
    assert run.left_out() == ["maml tiny 5-way 1-shot seed 0 (diverged at iteration 7)"]
    finish(run, cell)
    assert run.summary()["status"].tolist() == ["complete"]


def test_a_cell_that_a_crash_kept_from_its_name_gets_it(
    run: Run, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.fail(cell, "diverged")
    with monkeypatch.context() as crash:
        crash.setattr(Run, "_publish", lambda run, cell: None)
        finish(run, cell)
    assert run.records() == []
    run.recover("other source", lambda record: True)
    run.recover("source", lambda record: False)
    assert run.records() == []
    run.recover("source", lambda record: True)
    assert run.summary()["status"].tolist() == ["complete"]
    assert run.failures() == {}
    assert [path.name for path in run.cells.iterdir()] == [cell.id]


def test_a_cell_of_before_there_were_checksums_counts_as_sound(run: Run, cell: Cell) -> None:
    finish(run, cell)
    path = run.cells / cell.id / "cell.json"
    written = json.loads(path.read_text())
    old = {name: written[name] for name in ("settings", "source", "figures")}
    path.write_text(json.dumps(old))
    assert run.record(cell.id, thorough=True) is not None
    # With one of the two, it is no such cell.
    for name in ("files", "sha256"):
        path.write_text(json.dumps(old | {name: written[name]}))
        assert run.record(cell.id) is None


def test_a_file_that_could_not_be_written_leaves_nothing_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_text(path, "before")

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match=f"cannot write {path}: No space left on device; once"):
        write_text(path, "after")
    assert [path] == list(tmp_path.iterdir())
    assert path.read_text() == "before"


def test_one_run_at_a_time_uses_a_folder(run: Run) -> None:
    with (
        run.start(Sweep(devices=["cpu"])),
        pytest.raises(BenchError, match="in use by another run"),
    ):
        Run(run.folder).start(Sweep(devices=["cpu"]))


def test_what_makes_a_cell_is_in_the_source_hash() -> None:
    without_figures = {
        *("checkpoints", "environment", "errors", "files", "plugins", "signals", "store")
    }
    for name in DECISIVE:
        tree = ast.parse((HOME / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bench"):
                _, _, module = (node.module or "").partition(".")
                modules = [module] if module else [alias.name for alias in node.names]
                assert set(modules) <= {*DECISIVE, *without_figures}, f"bench/{name}.py"


def test_the_source_hash_is_of_the_code_and_of_the_plugin(tmp_path: Path) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text("a = 1\n")
    first = source_hash(plugin)
    assert first == source_hash(plugin)
    plugin.write_text("a = 2\n")
    assert len({first, source_hash(plugin), source_hash()}) == 3


def test_failures_that_cannot_be_read_are_kept_aside(run: Run, cell: Cell) -> None:
    path = run.folder / "failures.json"
    path.write_text('{"cut')
    run.fail(cell, "out of memory")
    assert list(run.failures()) == [cell.id]
    assert path.with_name("failures.damaged.json").read_text() == '{"cut'
    run.forgive(cell)
    run.fail(cell, "out of memory")
    assert path.with_name("failures.damaged.json").read_text() == '{"cut'


def test_the_source_hash_is_of_every_file_that_decides_a_figure(monkeypatch) -> None:
    """A byte more in any of them makes it another."""
    plain = source_hash()
    packages = [Path(str(package.__file__)).parent for package in (algorithms, datasets)]
    files = [path for folder in packages for path in folder.rglob("*.py")]
    files += [packages[0] / "kernels.c"]
    files += [HOME / f"{name}.py" for name in ("sweep", "making", "training", "distributed")]
    files += [HOME / f"{name}.py" for name in ("protocol", "stats", "measure")]
    read = Path.read_bytes
    for changed in files:

        def edited(path: Path, changed: Path = changed) -> bytes:
            return read(path) + b"#" * (path == changed)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "read_bytes", edited)
            assert source_hash() != plain, changed.name
