"""What a results folder holds, read within bounds: the folder may come from other hands.

A file can be anything: cut short, edited, or made to fill the memory or to crash whoever reads it.
Whatever is not what this program writes is a ValueError here, and a damaged cell to the caller.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from bench.errors import printable
from bench.sweep import MOST_LETTERS, Cell

MOST_BYTES = 64 << 20
"""Of a JSON file; a cell has 2 kB, the failures of 10,000 cells 50 MB."""
MOST_TABLE_BYTES = 1 << 30
MOST_ROWS = 10**7
MOST_COLUMNS = 100
LARGEST = 1e30
"""Of a figure or a score: squares of it are still numbers."""

NUMBERS = frozenset(
    (
        *("mean", "ci95", "train_seconds", "step_ms", "eval_ms_per_episode", "peak_memory_bytes"),
        *("step_gflops", "ci95_classes", "matmul_share", "step_joules", "gradient_error"),
        *("sample_reuse", "step_ms_iqr", "eval_ms_per_episode_iqr", "episode_gflops", "threads"),
    )
)
"""Figures of a cell that are numbers wherever they are known."""
WORDS = frozenset(
    (
        *("metric", "engine", "engine_reason", "precision", "episode_address"),
        *("train_data", "test_data"),
        *("commit", "processor", "torch", "source", "status", "cell_id"),
    )
)
OURS = frozenset(
    (
        *("key", "label", "entry", "seeds", "failed", "merit", "low", "high", "over"),
        *("ci_seeds", "ci_episodes", "samples_per_step", "gradients_per_step"),
    )
)
"""Columns that tables add: a setting of such a name would be taken for one."""


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        OSError, ValueError: a file that cannot be read, or is no JSON within the bounds.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would keep us waiting
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{path.name} is no file")
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"{path.name} has more than {MOST_BYTES >> 20} MiB")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError(f"{path.name} has lists in lists without end") from None


def cell_of(settings: Any) -> Cell:
    """A cell from its settings as they are written down.

    Raises:
        ValueError: they are not a cell's.
    """
    if not isinstance(settings, dict):
        raise ValueError("a cell's settings are a table")
    try:
        cell = Cell(**settings)
    except TypeError as error:
        raise ValueError(str(error)) from error
    named = frozenset(Cell.model_fields) | NUMBERS | WORDS - {"engine", "precision"} | OURS
    if taken := cell.hyperparameters.keys() & named:
        raise ValueError(f"{min(taken)} is no hyperparameter")
    return cell


def figures_of(written: Any) -> dict[str, Any]:
    """A cell's figures as they are written down.

    Raises:
        ValueError: they are not figures: numbers and words by their names.
    """
    if not isinstance(written, dict) or len(written) > MOST_COLUMNS:
        raise ValueError("figures are a table")
    for name, value in written.items():
        if name != printable(name) or len(name) > MOST_LETTERS or name in OURS | {"cell_id"}:
            raise ValueError("a figure has no such name")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and not abs(value) < LARGEST:  # NaN is not, either
            raise ValueError(f"{name} is not finite")
        if name in NUMBERS and not number and value is not None:
            raise ValueError(f"{name} is not a number")
        if name in Cell.model_fields and name != "engine":
            raise ValueError(f"{name} is a setting, not a figure")
        if not number and value is not None and not isinstance(value, bool):
            word_of(value)
    for name in WORDS & written.keys():
        if written[name] is not None:
            word_of(written[name])
    return written


def word_of(value: Any) -> str:
    """A word as it is written down.

    Raises:
        ValueError: it is not text, or not a line of it.
    """
    if not isinstance(value, str) or len(value) > 5 * MOST_LETTERS or value != printable(value):
        raise ValueError("not a line of text")
    return value


def failures_of(written: Any) -> dict[str, Any]:
    """Failures by the id of their cell, as they are written down; what is none is left out."""
    found: dict[str, Any] = {}
    for cell_id, failure in written.items() if isinstance(written, dict) else ():
        try:
            if cell_of(failure["settings"]).id == cell_id:
                # A reason has many lines and may hold anything, but what is no text.
                reason = failure["reason"].encode(errors="replace").decode()
                if not isinstance(failure.get("diverged_at", 0), int):
                    continue
                found[cell_id] = failure | {"reason": reason}
        except (AttributeError, KeyError, TypeError, ValueError):
            continue
    return found


def read_columns(
    path: Path,
    *names: str,
    rows: int,
    optional: Sequence[str] = (),
    words: Sequence[str] = (),
) -> dict[str, npt.NDArray[Any]]:
    """Columns of a small Parquet file, in a sixth of the time that a table of them takes: those of
    thousands of cells are read for a report.

    Args:
        path: the file.
        names: of the columns.
        rows: how many it has at most: a kilobyte can hold a billion equal ones.
        optional: columns that it may lack.
        words: columns that are text; all others are numbers.

    Raises:
        OSError, ValueError: a file that cannot be read, or is no such table.
        KeyError: it has no such column, and that is not optional.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is absent")
    try:
        with pq.ParquetFile(path) as file:
            _check_table(file, path, rows, words)
            columns = file.read(columns=[*names, *optional], use_threads=False)
    except pa.ArrowException as error:  # not all of them are ValueErrors
        raise ValueError(f"{path.name} is not a table: {error}") from error
    there = [*names, *(name for name in optional if name in columns.column_names)]
    return {name: columns[name].to_numpy() for name in there}


def _check_table(file: pq.ParquetFile, path: Path, rows: int, words: Sequence[str]) -> None:
    described = file.metadata
    groups = (described.row_group(index) for index in range(described.num_row_groups))
    if described.num_rows > min(rows, MOST_ROWS):
        raise ValueError(f"{path.name} has {described.num_rows:,} rows, not {rows:,}")
    if sum(group.total_byte_size for group in groups) > MOST_TABLE_BYTES:
        raise ValueError(f"{path.name} has more than {MOST_TABLE_BYTES >> 20} MiB")
    if len(file.schema_arrow) > MOST_COLUMNS:
        raise ValueError(f"{path.name} has more than {MOST_COLUMNS} columns")
    for column in file.schema_arrow:
        kind = column.type
        number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        plain = number or pa.types.is_boolean(kind) or pa.types.is_null(kind)
        if not (plain or (text and column.name in words)):
            raise ValueError(f"{path.name} has a column of {kind}")


def read_performance(path: Path, *names: str) -> dict[str, npt.NDArray[Any]]:
    """Columns of a cell's measurements, and where there are such ``inner_steps``; costs are
    positive, and each repeat of a phase is there once.

    Raises:
        OSError, ValueError: a file that cannot be read, or holds no measurements.
        KeyError: it has no such column.
    """
    words = ("phase", "session")
    found = read_columns(path, *names, rows=10**5, optional=["inner_steps"], words=words)
    for name in ("seconds", "process_seconds", "peak_bytes"):
        if (np.abs(found[name].astype(float)) >= LARGEST).any():  # not a number: not measured
            raise ValueError(f"{path.name} has {name} that are no number")
    repeat = found["repeat"].astype(float)
    steps = np.nan_to_num(found.get("inner_steps", np.zeros(len(repeat))).astype(float), nan=-1.0)
    known = ~np.isnan(repeat)
    keys = list(zip(found["phase"][known], steps[known], repeat[known], strict=True))
    if len(set(keys)) < len(keys):
        raise ValueError(f"{path.name} has a repeat twice")
    if (found["seconds"].astype(float)[known] <= 0).any():
        raise ValueError(f"{path.name} has times that are not positive")
    return found


def is_score(value: Any) -> bool:
    """Whether a value can be a cell's score."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and abs(value) < LARGEST
