"""Results on disk: one run is one folder, one cell is one folder in it, complete or absent.

A cell is made in ``cells/.<id>`` and renamed to ``cells/<id>`` once all of it is there, so that a
reader never meets half a cell, and a crash leaves what a resumed run goes on from.

``cell.json`` holds its own checksum and those of the cell's other files. A listing looks at the
former and at the files' sizes; whoever reads a table checks that table; a run that goes on, a
report and a comparison check every byte (``thorough``).
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import numpy.typing as npt
import pandas as pd
import tomli_w

import algorithms
import datasets
from bench.environment import MAKER, environment
from bench.errors import BenchError, DamagedError
from bench.files import make_folder, storing, sync, write_table, write_text
from bench.naming import in_order, names, varied
from bench.reading import cell_of, failures_of, figures_of, read_columns, read_json, word_of
from bench.sweep import Cell, Sweep

SCORES = "episodes.parquet"
TRAINING = "training.parquet"
PERFORMANCE = "performance.parquet"
CHECKPOINT = "checkpoint.safetensors"
RECORD = "cell.json"
FILES = (SCORES, TRAINING, PERFORMANCE, CHECKPOINT)
REQUIRED = (SCORES, TRAINING, CHECKPOINT)
"""Of :data:`FILES`, those without which there is no cell."""
TRAINED = "trained.json"
"""In a workplace: the figures of a cell that has only to be measured."""

LOOK_SECONDS = 0.5
"""How long to wait for a folder: ``status`` holds its lock for the moment of a look."""

SUMMARY_COLUMNS = (
    *("algorithm", "dataset", "ways", "shots", "test_shots", "train_shots", "seed", "device"),
    *("engine", "norm", "inner_steps", "eval_steps", "meta_batch", "iterations", "episodes"),
    *("metric", "mean", "ci95", "train_seconds", "step_ms", "eval_ms_per_episode"),
    *("peak_memory_bytes", "step_gflops", "cell_id", "status"),
    # Beyond the contract's, what a fair comparison must show.
    *(
        "precision",
        "protocol",
        "ci95_classes",
        "samples_per_step",
        "gradients_per_step",
        "step_ms_iqr",
        "eval_ms_per_episode_iqr",
        "episode_gflops",
        "matmul_share",
        "step_joules",
        "gradient_error",
        "sample_reuse",
        "diverged_at",
        "train_data",
        "test_data",
        "source",
        *MAKER,
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
        made = {"source": self.source, "cell_id": cell.id, "status": "complete"}
        return cell.row() | counts | self.figures | made


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
        asked = sweep.model_dump(mode="json", exclude_none=True)
        lock = filelock.FileLock(self.folder / ".lock", timeout=LOOK_SECONDS)
        try:
            make_folder(self.cells)
            lock.acquire()  # the system's own, which ends with its process, however that ends
            write_text(self.folder / "sweep.toml", tomli_w.dumps(asked))
            write_text(self.folder / "environment.json", to_json(environment(sweep)))
        except filelock.Timeout as error:
            raise BenchError(f"{self.folder} is in use by another run") from error
        except (OSError, NotImplementedError) as error:  # the latter: a disk without locks
            lock.release()
            reason = getattr(error, "strerror", None) or error
            raise BenchError(f"cannot write to {self.folder}: {reason}") from error
        return lock

    def place(self, cell: Cell) -> Path:
        """Where :meth:`workplace` is, or will be."""
        folder = self.cells / f".{cell.id}"
        if folder.is_symlink():  # to a place that is not this run's
            folder.unlink()
        return folder

    def workplace(self, cell: Cell) -> Path:
        """The folder in which a cell is being made."""
        folder = self.place(cell)
        make_folder(folder)
        return folder

    def note_trained(self, cell: Cell, source: str, figures: dict[str, Any]) -> None:
        """Note the figures of the cell in its workplace, which has only to be measured."""
        workplace = self.workplace(cell)
        contents = {"source": source, "figures": figures}
        write_text(workplace / TRAINED, to_json(_sealed(contents, workplace)))

    def trained(self, cell: Cell, source: str, data: dict[str, str]) -> dict[str, Any] | None:
        """What :meth:`note_trained` noted; None where it did not, or not of this source and these
        data, or where a file has changed since."""
        try:
            noted = _opened(self.place(cell), TRAINED)
            _verify(self.place(cell), noted)
        except (OSError, ValueError):
            return None
        figures: dict[str, Any] = noted["figures"]
        same = noted["source"] == source and data.items() <= figures.items()
        return figures if same else None

    def complete(self, cell: Cell, source: str, figures: dict[str, Any]) -> Record:
        """Make the cell in its workplace one of the run's results."""
        workplace = self.workplace(cell)
        contents = {"settings": cell.model_dump(), "source": source, "figures": figures}
        write_text(workplace / RECORD, to_json(_sealed(contents, workplace)))
        # From here on all of the cell is on the disk: what a crash interrupts, recover() ends.
        self.forgive(cell)
        self._publish(cell)
        return Record(cell, source, figures)

    def recover(self, source: str, same_data: Callable[[Record], bool]) -> None:
        """End what a crash left between a cell's being whole and its having its name, where it is
        of this source and of the data of now."""
        for workplace in self.cells.glob(".*"):
            try:
                record = _record(workplace, workplace.name[1:], thorough=True)
            except (OSError, DamagedError):
                continue
            if record.source == source and same_data(record):
                self.forgive(record.cell)
                self._publish(record.cell)

    def _publish(self, cell: Cell) -> None:
        """Give the cell in its workplace, with all of its files and no others, its name."""
        workplace, final = self.workplace(cell), self.cells / cell.id
        with storing(final):
            for path in workplace.iterdir():
                if path.name not in (RECORD, *FILES):
                    path.unlink()
            sync(workplace)
            if final.exists():  # damaged, or the cell would have been skipped
                shutil.rmtree(final)
            workplace.rename(final)
            sync(self.cells)

    def fail(self, cell: Cell, reason: str, diverged_at: int | None = None) -> None:
        """Note that a cell came to nothing, and why.

        Args:
            cell: which.
            reason: in words, with the traceback where there is one.
            diverged_at: the iteration at which its training diverged, if it did.
        """
        failure: dict[str, Any] = {"settings": cell.model_dump(), "reason": reason}
        if diverged_at is not None:
            failure["diverged_at"] = diverged_at
        path = self.folder / "failures.json"
        known = self.failures()
        if not known and path.is_file() and path.stat().st_size > len("{}\n"):
            path.rename(path.with_name("failures.damaged.json"))  # for whoever can still read it
        write_text(path, to_json(known | {cell.id: failure}))

    def forgive(self, cell: Cell) -> None:
        """Forget an earlier failure of a cell."""
        failures = self.failures()
        if failures.pop(cell.id, None) is not None:
            write_text(self.folder / "failures.json", to_json(failures))

    def write_summary(self) -> tuple[pd.DataFrame, list[str]]:
        """Write ``summary.csv`` and ``summary.parquet`` from the cells that are there.

        Returns:
            :meth:`summary`, and the settings that tell cells of one algorithm apart where nothing
            else does.
        """
        summary, swept = self._summary()
        write_text(self.folder / "summary.csv", summary.to_csv(index=False))
        write_table(self.folder / "summary.parquet", summary)
        return summary, swept

    # Reading.

    def record(self, cell_id: str, thorough: bool = False) -> Record | None:
        """A complete cell, or None where it is absent or damaged."""
        try:
            return self.sound(cell_id, thorough)
        except (OSError, DamagedError):
            return None

    def sound(self, cell_id: str, thorough: bool = True) -> Record:
        """A complete cell.

        Args:
            cell_id: which.
            thorough: check every byte; else ``cell.json`` and the sizes of the other files.

        Raises:
            DamagedError: it is not as it was written.
            OSError: a file that cannot be read.
        """
        return _record(self.cells / cell_id, cell_id, thorough)

    def state(self, cells: Iterable[Cell]) -> tuple[set[str], dict[str, str]]:
        """The ids of those of some cells that are complete, and what is wrong with those that are
        damaged, every byte checked."""
        done: set[str] = set()
        damaged: dict[str, str] = {}
        for cell in cells:
            if (self.cells / cell.id).exists():
                try:
                    done.add(self.sound(cell.id).cell.id)
                except (OSError, DamagedError) as error:
                    damaged[cell.id] = str(error)
        return done, damaged

    def described(self, cell_id: str) -> Cell | None:
        """What a cell's ``cell.json`` says that it is, whatever became of the other files."""
        try:
            written = _opened(self.cells / cell_id, RECORD)
            cell = cell_of(written["settings"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return cell if cell.id == cell_id else None

    def cell_ids(self) -> list[str]:
        """Ids of the cells that have a folder, damaged ones too; none where there is no run."""
        if not self.cells.is_dir():
            return []
        return sorted(path.name for path in self.cells.iterdir() if not path.name.startswith("."))

    def records(self, thorough: bool = False) -> list[Record]:
        """The complete cells, in the order of their settings."""
        found = (self.record(cell_id, thorough) for cell_id in self.cell_ids())
        return in_order_of_settings(record for record in found if record)

    def failures(self) -> dict[str, Any]:
        """Why cells failed, by their id."""
        try:
            return failures_of(read_json(self.folder / "failures.json"))
        except (OSError, ValueError):
            return {}

    def lost(self) -> list[Cell]:
        """The cells that came to nothing."""
        return _cells(self.failures())

    def left_out(self, complete: Sequence[Cell] = ()) -> list[str]:
        """The cells that came to nothing, told apart from each other and the complete ones, and
        how."""
        failures = self.failures()
        called = names([*complete, *_cells(failures)])
        found = []
        for cell_id, failure in failures.items():
            how = outcome(failure)
            at = f" at iteration {how['diverged_at']}" if "diverged_at" in how else ""
            found.append(f"{called[cell_id]} ({how['status']}{at})")
        return found

    def summary(self) -> pd.DataFrame:
        """One row a cell, with the columns of :data:`SUMMARY_COLUMNS` and those of the settings
        that were swept."""
        return self._summary()[0]

    def _summary(self) -> tuple[pd.DataFrame, list[str]]:
        records, failed, failures = self.records(), self._failed(), self.failures()
        rows = [record.row() for record in records]
        rows += [
            settings | {"cell_id": cell_id, **outcome(failures[cell_id])}
            for cell_id, settings in failed.items()
        ]
        swept = varied([*(record.cell.row() for record in records), *failed.values()])
        if len({record.source for record in records}) > 1:
            swept = [*swept, "source"]
        columns = dict.fromkeys((*SUMMARY_COLUMNS, *swept))
        return pd.DataFrame(rows).reindex(columns=list(columns)), swept

    def _failed(self) -> dict[str, dict[str, Any]]:
        """The settings of failed cells, each in one table."""
        return {
            cell_id: {n: v for n, v in failure["settings"].items() if n != "hyperparameters"}
            | failure["settings"]["hyperparameters"]
            for cell_id, failure in self.failures().items()
        }

    def scores(self, cell: Cell) -> pd.DataFrame:
        """The episodes of a complete cell: ``episode``, ``step``, ``loss``, ``metric``."""
        return self.table(cell, SCORES)

    def table(self, cell: Cell, name: str) -> pd.DataFrame:
        """One of the tables of a complete cell, by its file's name.

        Raises:
            DamagedError: it is not as it was written.
            FileNotFoundError: the cell has no such table.
        """
        folder = self.cells / cell.id
        contents = (folder / name).read_bytes()
        files = _opened(folder, RECORD).get("files")
        if files is not None and files.get(name) != _sum(contents):
            raise DamagedError(f"{name} does not have its checksum")
        return pd.read_parquet(io.BytesIO(contents))

    def scores_by_step(self, cell: Cell) -> npt.NDArray[np.float64]:
        """The metric of a complete cell, ``(episodes, steps + 1)``.

        Raises:
            OSError, ValueError, KeyError: the file is not what it should be.
        """
        path, rows = self.cells / cell.id / SCORES, cell.episodes * (cell.eval_steps + 1)
        read = read_columns(path, "episode", "step", "metric", rows=rows)
        order = np.lexsort((read["step"], read["episode"]))
        episode, step = (read[name][order] for name in ("episode", "step"))
        shape = np.unique(episode).size, np.unique(step).size
        if not (
            episode.size == math.prod(shape)
            and (episode.reshape(shape) == episode[:: shape[1], None]).all()
            and (step.reshape(shape) == step[: shape[1]]).all()
        ):
            raise ValueError("scores are not there once for each episode and step")
        return read["metric"][order].astype(np.float64).reshape(shape)


def in_order_of_settings(records: Iterable[Record]) -> list[Record]:
    """Records as people look for them: by dataset, ways, shots, algorithm, seed and what else tells
    them apart."""
    rows = [(record, record.cell.row()) for record in records]
    order = ("dataset", "ways", "shots", "algorithm", "seed", *varied(row for _, row in rows))
    rows.sort(key=lambda pair: [in_order(pair[1].get(name)) for name in order])
    return [record for record, _ in rows]


def _cells(failures: dict[str, Any]) -> list[Cell]:
    return [Cell(**failure["settings"]) for failure in failures.values()]


def outcome(failure: dict[str, Any]) -> dict[str, Any]:
    """The columns of the summary that say what a failure was: ``status``, which is ``failed`` or
    ``diverged``, and then ``diverged_at``, an iteration."""
    if "diverged_at" in failure:
        return {"status": "diverged", "diverged_at": failure["diverged_at"]}
    return {"status": "failed"}


def _sealed(contents: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Contents with the checksums of a cell's files in a folder, flushed to the disk, and with one
    of all that, so that no change goes unseen."""
    files = {}
    for name in FILES:
        if (folder / name).exists():
            with storing(folder / name):
                sync(folder / name)
                files[name] = _sum((folder / name).read_bytes())
    contents = json.loads(to_json(contents | {"files": files}))  # as it will be read
    return contents | {"sha256": _seal(contents)}


def _opened(folder: Path, name: str) -> dict[str, Any]:
    """What :func:`_sealed` made; cells of before there were checksums count as sound.

    Raises:
        OSError: it cannot be read.
        DamagedError: it is not as it was written.
    """
    try:
        contents: dict[str, Any] = read_json(folder / name)
        seal = contents.pop("sha256", None)
    except (ValueError, TypeError, AttributeError) as error:
        raise DamagedError(f"{name} is not JSON") from error
    if seal != (_seal(contents) if "files" in contents else None):
        raise DamagedError(f"{name} does not have its checksum")
    return contents


def _verify(folder: Path, contents: dict[str, Any]) -> None:
    """Read every file that sealed contents speak of.

    Raises:
        OSError: one that cannot be read.
        DamagedError: one that is not as it was written.
    """
    for name, known in contents.get("files", {}).items():
        if _sum((folder / name).read_bytes()) != known:
            raise DamagedError(f"{name} does not have its checksum")


def _record(folder: Path, cell_id: str, thorough: bool) -> Record:
    """The record of a whole cell in a folder.

    Raises:
        OSError: a file that cannot be read.
        DamagedError: the cell is not whole.
    """
    sizes = {}
    for name in (RECORD, *FILES):
        with suppress(FileNotFoundError):
            sizes[name] = (folder / name).stat().st_size
    for name in (RECORD, *REQUIRED):
        if not sizes.get(name):
            raise DamagedError(f"{name} is absent or empty")
    contents = _opened(folder, RECORD)
    for name, known in contents.get("files", {}).items():
        if sizes.get(name) != known["bytes"]:
            raise DamagedError(f"{name} has {sizes.get(name, 0)} bytes, not {known['bytes']}")
    try:
        cell = cell_of(contents["settings"])
        record = Record(cell, word_of(contents["source"]), figures_of(contents["figures"]))
    except (ValueError, KeyError, TypeError):
        cell = None
    if cell is None or cell.id != cell_id:
        raise DamagedError(
            f"{RECORD} does not describe this cell: it was changed, or made by another version"
        )
    if thorough:
        _verify(folder, contents)
    return record


def _seal(contents: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def _sum(contents: bytes) -> dict[str, Any]:
    return {"bytes": len(contents), "sha256": hashlib.sha256(contents).hexdigest()}


DECISIVE = ("sweep", "making", "training", "distributed", "protocol", "stats", "measure")
"""Modules of this package that decide a cell's figures."""


def source_hash(plugin: Path | None = None) -> str:
    """A hash of the code that decides a cell's figures: the algorithms, the datasets, what of the
    harness is :data:`DECISIVE`, and a plug-in."""
    home = Path(__file__).resolve().parent
    decisive = [home / f"{name}.py" for name in DECISIVE]
    for package in (algorithms, datasets):  # which need not lie beside this one
        folder = Path(str(package.__file__)).resolve().parent
        decisive += sorted((*folder.rglob("*.py"), *folder.rglob("*.c")))
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
