"""A run's complete cells with their scores and costs, put together by what they were made with.

Whoever compares, checks or reports reads cells here: what counts as a sound one is said once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.errors import BenchError, DamagedError, printable
from bench.measure import STEP
from bench.naming import labelled
from bench.reading import is_score, read_performance
from bench.stats import Floats, finite
from bench.store import PERFORMANCE, RECORD, Record, Run, in_order_of_settings
from bench.sweep import Cell

MEASURED = ("phase", "repeat", "seconds", "process_seconds", "peak_bytes", "session")
MOST_NAMED = 10
"""Cells without a score that are named."""
COUNTS = ("samples_per_step", "gradients_per_step")
"""What other settings come to: how much a meta-step sees and does."""


# Cells on disk -> results


@dataclass(frozen=True, eq=False)
class Result:
    """A complete cell: its record, its score in every episode and what it cost.

    Attributes:
        by_step: the metric after each inner step, ``(episodes, steps + 1)``.
        performance: columns of ``performance.parquet``, :data:`MEASURED` and where it has them
            ``inner_steps``; empty where nothing was measured.
    """

    record: Record
    by_step: Floats
    performance: Mapping[str, npt.NDArray[Any]]

    @cached_property
    def scores(self) -> Floats:
        """The metric after the last inner step, ``(episodes,)``."""
        return np.ascontiguousarray(self.by_step[:, -1])

    @cached_property
    def steps(self) -> dict[tuple[str, int], tuple[float, float]]:
        """Seconds and peak bytes of each meta-step that was measured, by session and repeat."""
        seconds, peaks = (self.repeats(STEP, name) for name in ("seconds", "peak_bytes"))
        return {key: (seconds[key], peaks[key]) for key in seconds}

    def repeats(self, phase: str, column: str) -> dict[tuple[str, int], float]:
        """What each repeat of a phase cost, by session and repeat; NaN where it is not known."""
        at = np.flatnonzero(self.performance["phase"] == phase)
        keys = (self.performance[name][at] for name in ("session", "repeat"))
        values = self.performance[column][at].astype(float).tolist()
        return dict(zip(zip(*keys, strict=True), values, strict=True))

    @property
    def episodes(self) -> tuple[str, int]:
        """Which test episodes it met: results may be paired where these are equal, unless they are
        known to be of other data (:func:`of_other_data`)."""
        return self.record.figures["episode_address"], len(self.scores)

    @property
    def data(self) -> dict[str, str | None]:
        """Hashes of what it was trained and tested on; None for what is not known, or computed."""
        return {name: self.record.figures.get(name) for name in ("train_data", "test_data")}

    @property
    def likeness(self) -> tuple[Any, ...]:
        """What results that differ in nothing but the seed share."""
        return (self.cell.seedless_id, self.record.source, *self.data.values())

    @property
    def metric(self) -> str:
        """``accuracy`` or ``mse``."""
        return str(self.record.figures["metric"])

    @property
    def cell(self) -> Cell:
        """What was run."""
        return self.record.cell

    @property
    def higher_is_better(self) -> bool:
        """True of an accuracy, False of an error."""
        return self.metric == "accuracy"


def of_other_data(a: Result, b: Result) -> bool:
    """Whether test episodes of one address are known to be of other data."""
    x, y = a.data["test_data"], b.data["test_data"]
    return x is not None and y is not None and x != y


def load(run: Run, cell_id: str) -> Result:
    """A complete cell, every byte of it checked.

    Raises:
        DamagedError: it is not what this program writes; the message says what is wrong.
    """
    try:
        record = run.sound(cell_id)
        cell, figures = record.cell, record.figures
        scored = figures.get("metric") in ("accuracy", "mse") and is_score(figures.get("mean"))
        if not (scored and figures.get("episode_address")):
            raise DamagedError(f"{RECORD} has no score")
        path = run.cells / cell.id / PERFORMANCE
        performance = {name: np.empty(0) for name in MEASURED}
        if path.is_file():
            performance = read_performance(path, *MEASURED)
        found = Result(record, run.scores_by_step(cell), performance)
        finite(found.by_step, "scores", 2)
        if found.by_step.shape != (cell.episodes, cell.eval_steps + 1):
            count = len(found.by_step)
            raise DamagedError(f"scores of {count} episodes, not of {cell.episodes}")
    except DamagedError:
        raise
    except Exception as error:  # a file of other hands can fail its reader in any way
        raise DamagedError(why(error)) from error
    return found


def why(error: Exception) -> str:
    """What a reader that failed says of a file."""
    return f"no column {error}" if isinstance(error, KeyError) else f"{error}"


def read(folder: Path, *, none_will_do: bool = False) -> tuple[list[Result], list[str]]:
    """A run's complete cells, in the order of their settings, and the ids of those that are
    damaged.

    Raises:
        BenchError: a folder that holds no run, or, unless that will do, no complete cell.
    """
    run = Run(folder)
    if not run.cells.is_dir():
        raise BenchError(f"there is no run in {folder}: it has no cells/")
    found: dict[str, Result] = {}
    there = run.cell_ids()
    for cell_id in there:
        with suppress(DamagedError):
            found[cell_id] = load(run, cell_id)
    damaged = [cell_id for cell_id in there if cell_id not in found]
    if not found and not none_will_do:
        also = f"; {len(damaged)} are damaged" if damaged else ""
        raise BenchError(f"{folder} has no complete cells{also}")
    records = in_order_of_settings(result.record for result in found.values())
    return [found[record.cell.id] for record in records], damaged


def damage_notes(folder: Path, damaged: Sequence[str]) -> list[str]:
    """A line that names damaged cells, if there are any."""
    if not damaged:
        return []
    names = ", ".join(map(printable, damaged))
    return [f"skipped, for they are damaged: {names} in {folder}; the same 'run' makes them again"]


def left_out_notes(folder: Path, results: Sequence[Result]) -> list[str]:
    """A line that names the cells of a run, with these results, that came to nothing, if there are
    any."""
    lost = Run(folder).left_out([result.cell for result in results])
    if not lost:
        return []
    more = f" and {len(lost) - MOST_NAMED} more" if len(lost) > MOST_NAMED else ""
    return [f"left out, for they have no score: {', '.join(lost[:MOST_NAMED])}{more} in {folder}"]


# Results -> entrants


@dataclass(frozen=True, eq=False)
class Entrant:
    """An algorithm as it was set up, with its results by seed."""

    by_seed: dict[int, Result]

    @property
    def any(self) -> Result:
        """One of its results: all but the seed is the same in each."""
        return next(iter(self.by_seed.values()))

    @property
    def algorithm(self) -> str:
        """The algorithm's name."""
        return self.any.cell.algorithm

    @property
    def place(self) -> tuple[str, int, int]:
        """Dataset, ways and shots."""
        cell = self.any.cell
        return cell.dataset, cell.ways, cell.shots

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that decided its results but the algorithm and the seed."""
        record = self.any.record
        return (
            record.cell.model_dump(exclude={"algorithm", "seed", "hyperparameters"})
            | record.cell.hyperparameters
            | {name: getattr(record.cell, name) for name in COUNTS}
            | {"engine": record.figures.get("engine"), "source": record.source}
            | {name: digest for name, digest in self.any.data.items() if digest}
        )

    @property
    def row(self) -> dict[str, Any]:
        """The algorithm and the settings, as :func:`bench.naming.labelled` takes them."""
        own = {name: value for name, value in self.settings.items() if name not in COUNTS}
        return {"algorithm": self.algorithm, **own}


def entrants(results: Iterable[Result]) -> list[Entrant]:
    """Results put together that differ in nothing but the seed; of equal ones, the first stays."""
    groups: dict[tuple[Any, ...], dict[int, Result]] = {}
    for result in results:
        groups.setdefault(result.likeness, {}).setdefault(result.cell.seed, result)
    return [Entrant(by_seed) for by_seed in groups.values()]


def differing(a: Entrant, b: Entrant) -> dict[str, tuple[Any, Any]]:
    """The settings both have, with values that are not the same."""
    x, y = a.settings, b.settings
    return {name: (x[name], y[name]) for name in x if name in y and x[name] != y[name]}


def labels(
    field: Sequence[Entrant], lost: Sequence[Cell] = ()
) -> tuple[dict[Entrant, str], list[str]]:
    """A name for each entrant, and for each cell that came to nothing: the algorithm's, with what
    tells it from its namesakes among all of them."""
    rows = [entrant.row for entrant in field]
    for cell in lost:  # which engine would have run is not known
        rows.append({n: v for n, v in cell.row().items() if (n, v) != ("engine", "auto")})
    names = labelled(rows)
    return dict(zip(field, names, strict=False)), names[len(field) :]
