"""Results on disk: one run is one folder, one cell is one folder in it, complete or absent.

A cell is made in ``cells/.<id>`` and renamed to ``cells/<id>`` once all of it is there, so that a
reader never meets half a cell, and a crash leaves what a resumed run goes on from.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import numpy.typing as npt
import pandas as pd
import tomli_w

from bench.environment import environment
from bench.errors import BenchError
from bench.files import whole, write_text
from bench.reading import cell_of, failures_of, figures_of, read_json, read_table, word_of
from bench.sweep import Cell, Sweep, in_order, varied

SCORES = "episodes.parquet"
TRAINING = "training.parquet"
PERFORMANCE = "performance.parquet"
CHECKPOINT = "checkpoint.safetensors"
RECORD = "cell.json"

SUMMARY_COLUMNS = (
    *("algorithm", "dataset", "ways", "shots", "test_shots", "train_shots", "seed", "device"),
    *("engine", "norm", "inner_steps", "eval_steps", "meta_batch", "iterations", "episodes"),
    *("metric", "mean", "ci95", "train_seconds", "step_ms", "eval_ms_per_episode"),
    *("peak_memory_bytes", "step_gflops", "cell_id", "status"),
    # Beyond the contract's, what a fair comparison must show.
    *(
        "protocol",
        "ci95_classes",
        "samples_per_step",
        "gradients_per_step",
        "matmul_share",
        "step_joules",
        "gradient_error",
        "sample_reuse",
    ),
)


@dataclass(frozen=True)
class Record:
    """What ``cell.json`` holds: the settings, the headline figures and where they came from."""

    cell: Cell
    source: str
    figures: dict[str, Any]

    def row(self) -> dict[str, Any]:
        """This cell's row of the summary; what was not measured is absent."""
        cell = self.cell
        counts = {
            "samples_per_step": cell.samples_per_step,
            "gradients_per_step": cell.gradients_per_step,
        }
        return cell.row() | counts | self.figures | {"cell_id": cell.id, "status": "complete"}


class Run:
    """One run's folder.

    Args:
        folder: where; it is made when something is first written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cells = folder / "cells"
        self.figures = folder / "figures"

    # Writing.

    def start(self, sweep: Sweep) -> filelock.BaseFileLock:
        """Make the folder, note what was asked and on what machine, and keep others out.

        Raises:
            BenchError: a folder that cannot be written, or that another run is using.
        """
        try:
            self.cells.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.folder / ".lock", timeout=0)
            lock.acquire()
        except filelock.Timeout as error:
            raise BenchError(f"{self.folder} is in use by another run") from error
        except OSError as error:
            raise BenchError(f"cannot write to {self.folder}: {error.strerror}") from error
        asked = sweep.model_dump(mode="json", exclude_none=True)
        write_text(self.folder / "sweep.toml", tomli_w.dumps(asked))
        write_text(self.folder / "environment.json", to_json(environment(sweep)))
        return lock

    def workplace(self, cell: Cell) -> Path:
        """The folder in which a cell is being made."""
        folder = self.cells / f".{cell.id}"
        if folder.is_symlink():  # to a place that is not this run's
            folder.unlink()
        folder.mkdir(exist_ok=True)
        return folder

    def complete(self, cell: Cell, source: str, figures: dict[str, Any]) -> Record:
        """Make the cell in its workplace one of the run's results."""
        record = Record(cell, source, figures)
        workplace = self.workplace(cell)
        contents = {"settings": cell.model_dump(), "source": source, "figures": figures}
        write_text(workplace / RECORD, to_json(contents))
        for leftover in (workplace / "training.safetensors", workplace / "trained.json"):
            leftover.unlink(missing_ok=True)
        final = self.cells / cell.id
        if final.exists():  # damaged, or the cell would have been skipped
            shutil.rmtree(final)
        workplace.rename(final)
        self.forgive(cell)
        return record

    def fail(self, cell: Cell, reason: str) -> None:
        """Note that a cell failed; it is tried again when the run is resumed."""
        failures = self.failures() | {cell.id: {"settings": cell.model_dump(), "reason": reason}}
        write_text(self.folder / "failures.json", to_json(failures))

    def forgive(self, cell: Cell) -> None:
        """Forget an earlier failure of a cell."""
        failures = self.failures()
        if failures.pop(cell.id, None) is not None:
            write_text(self.folder / "failures.json", to_json(failures))

    def write_summary(self) -> pd.DataFrame:
        """Write ``summary.csv`` and ``summary.parquet`` from the cells that are there."""
        summary = self.summary()
        write_text(self.folder / "summary.csv", summary.to_csv(index=False))
        with whole(self.folder / "summary.parquet") as aside:
            summary.to_parquet(aside, index=False)
        return summary

    # Reading.

    def record(self, cell_id: str) -> Record | None:
        """A complete cell, or None where it is absent or damaged."""
        folder = self.cells / cell_id
        try:
            written = read_json(folder / RECORD)
            cell = cell_of(written["settings"])
            record = Record(cell, word_of(written["source"]), figures_of(written["figures"]))
            whole = all((folder / name).stat().st_size for name in (SCORES, TRAINING, CHECKPOINT))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record if whole and cell.id == cell_id else None

    def cell_ids(self) -> list[str]:
        """Ids of the cells that have a folder, damaged ones too; none where there is no run."""
        if not self.cells.is_dir():
            return []
        return sorted(path.name for path in self.cells.iterdir() if not path.name.startswith("."))

    def records(self) -> list[Record]:
        """The complete cells, in the order of their settings."""
        records = [record for cell_id in self.cell_ids() if (record := self.record(cell_id))]
        rows = {record.cell.id: record.cell.row() for record in records}
        order = ("dataset", "ways", "shots", "algorithm", "seed", *varied(rows.values()))
        return sorted(
            records, key=lambda record: [in_order(rows[record.cell.id].get(name)) for name in order]
        )

    def failures(self) -> dict[str, Any]:
        """Why cells failed, by their id."""
        try:
            return failures_of(read_json(self.folder / "failures.json"))
        except (OSError, ValueError):
            return {}

    def summary(self) -> pd.DataFrame:
        """One row a cell, with the columns of :data:`SUMMARY_COLUMNS` and of :meth:`swept`."""
        rows = [record.row() for record in self.records()]
        rows += [
            settings | {"cell_id": cell_id, "status": "failed"}
            for cell_id, settings in self._failed().items()
        ]
        columns = dict.fromkeys((*SUMMARY_COLUMNS, *self.swept()))
        return pd.DataFrame(rows).reindex(columns=list(columns))

    def swept(self) -> list[str]:
        """The settings that tell cells of one algorithm apart where nothing else does."""
        return varied([*(r.cell.row() for r in self.records()), *self._failed().values()])

    def _failed(self) -> dict[str, dict[str, Any]]:
        """The settings of failed cells, each in one table."""
        return {
            cell_id: {n: v for n, v in failure["settings"].items() if n != "hyperparameters"}
            | failure["settings"]["hyperparameters"]
            for cell_id, failure in self.failures().items()
        }

    def scores(self, cell: Cell) -> pd.DataFrame:
        """The episodes of a complete cell: ``episode``, ``step``, ``loss``, ``metric``."""
        return read_table(self.cells / cell.id / SCORES, cell.episodes * (cell.eval_steps + 1))

    def scores_by_step(self, cell: Cell) -> npt.NDArray[np.float64]:
        """The metric of a complete cell, ``(episodes, steps + 1)``."""
        scores = self.scores(cell).pivot(index="episode", columns="step", values="metric")
        return scores.to_numpy(dtype=np.float64)


def source_hash(plugin: Path | None = None) -> str:
    """A hash of the code that decides a cell's figures: the algorithms, the datasets and the
    harness's own training, protocol and measurement, and a plug-in."""
    home = Path(__file__).resolve().parent
    decisive = [home / f"{name}.py" for name in ("sweep", "training", "protocol", "measure")]
    for package in ("algorithms", "datasets"):
        decisive += sorted((home.parent / package).rglob("*.py"))
    if plugin is not None:
        decisive.append(plugin)
    digest = hashlib.sha256()
    for path in decisive:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def to_json(value: Any) -> str:
    """JSON for people: indented, and numbers as Python's own."""

    def plain(item: Any) -> Any:
        if isinstance(item, np.generic):
            return item.item()
        raise TypeError(f"cannot write {type(item)} as JSON")

    return json.dumps(value, indent=2, default=plain) + "\n"
