"""Published results, run again: recipes, what they came to, and whether that agrees.

A recipe is a TOML file in ``bench/recipes``: a sweep's settings and the published figure they are
held against. ``results/published.csv`` has every published figure with its protocol,
``results/reference/`` what this project obtained itself.
"""

from __future__ import annotations

import difflib
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bench import stats
from bench.environment import makers
from bench.errors import BenchError
from bench.files import write_text
from bench.measure import STEP
from bench.stats import Interval
from bench.store import PERFORMANCE, TRAINING, Record, Run, to_json
from bench.sweep import Cell, Rate, Sweep, first_fault, read_sweep

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HOME = Path(__file__).resolve().parent
RECIPES = HOME / "recipes"
KINDS = {
    "episodes": "95% over test episodes",
    "seeds": "95% over seeds",
    "std over inits": "std over 3 initialisations",
    "unknown": "kind unknown",
    "none": "",
}
"""Kinds of the intervals in ``published.csv``, and how each is named beside a figure."""


class Recipe(BaseModel):
    """A published result, and what it takes to obtain it.

    Attributes:
        name: of its file.
        title: what it is, for a table.
        source: the paper, and the code where that was read.
        published: key of the figure in ``published.csv`` that it is held against.
        margin: how far ours may be from it and still agree, in the figure's unit; it was set
            before any run.
        step: inner steps after which the figure was taken; None takes the last.
        caveat: what makes the two incomparable, where something does.
        sweep: settings of the sweep.
        beside: settings of further sweeps that belong to it, by name, put over the first one's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str
    source: str
    published: str
    margin: Rate
    step: int | None = Field(default=None, ge=0)
    caveat: str = ""
    sweep: dict[str, Any]
    beside: dict[str, dict[str, Any]] = {}

    def sweeps(self, scale: float = 1.0, **asked: Any) -> dict[str, Sweep]:
        """Its sweep under ``""``, and those beside it by name.

        Args:
            scale: share of the published iterations, at least one of which is made.
            asked: what a user asked for; None leaves it to the recipe.

        Raises:
            BenchError: a scale that is not positive, or a setting that cannot be.
        """
        if not 0 < scale < math.inf:
            raise BenchError(f"scale is {scale}; it must be positive")
        iterations = max(1, round(self.sweep["iterations"] * scale))
        over = {"iterations": iterations} | {n: v for n, v in asked.items() if v is not None}
        each: dict[str, dict[str, Any]] = {"": {}} | self.beside
        return {name: read_sweep(None, self.sweep | own | over) for name, own in each.items()}


class Published(BaseModel):
    """A row of ``published.csv``; accuracies are in per cent.

    Attributes:
        half_width: of the interval as printed, None where none is.
        interval: what that is, a key of :data:`KINDS`.
        queries: query samples a class of a test episode, None where that is not known.
        certainty: ``sure``, or ``memory`` for what was not checked in the source.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    algorithm: str
    dataset: str
    ways: int | None
    shots: int | None
    metric: str
    value: float
    half_width: float | None
    interval: str
    transductive: str
    queries: int | None
    split: str
    protocol: str
    source: str
    certainty: str

    @property
    def half_95(self) -> float:
        """Half-width of a 95% interval, as far as what is printed can tell; 0 where nothing is."""
        if self.half_width is None:
            return 0.0
        if self.interval == "std over inits":  # Student's t for a mean of 3
            return self.half_width * 4.303 / math.sqrt(3)
        return self.half_width

    def __str__(self) -> str:
        kind = KINDS[self.interval]
        return figure(self.metric, self.value, self.half_width) + (f" ({kind})" if kind else "")


def results() -> Path:
    """The folder of kept results: the checkout's, or the copy that an installed package has."""
    packaged = HOME / "results"
    return packaged if packaged.is_dir() else HOME.parent / "results"


def names() -> list[str]:
    """Every recipe."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def read(name: str) -> Recipe:
    """A recipe by its name. One that ``extends`` another has that one's settings under its own.

    Raises:
        BenchError: no such name; the message has the nearest one.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "see 'python -m bench list recipes'"
        raise BenchError(f"no recipe is called {name!r}; {hint}")
    return Recipe(name=name, **_settings(name))


def _settings(name: str) -> dict[str, Any]:
    own = tomllib.loads((RECIPES / f"{name}.toml").read_text(encoding="utf-8"))
    if "extends" not in own:
        return own
    base = _settings(own.pop("extends"))
    return base | own | {"sweep": base["sweep"] | own["sweep"]}


def published() -> dict[str, Published]:
    """Every published figure by its key.

    Raises:
        BenchError: a row that cannot be.
    """
    path = results() / "published.csv"
    rows = pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")
    found: dict[str, Published] = {}
    for row in rows:
        # An empty cell is an unknown number, and an empty text.
        numbers = ("ways", "shots", "half_width", "queries")
        filled = {n: None if v == "" and n in numbers else v for n, v in row.items()}
        try:
            figure = Published(**filled)  # type: ignore[arg-type]
        except ValidationError as error:
            raise BenchError(f"{path}: {row['key']}: {first_fault(error)}") from error
        found[figure.key] = figure
    return found


# Ours beside theirs


@dataclass(frozen=True)
class Verdict:
    """Whether ours agrees with what was published, in the figure's unit.

    ``word`` is "agrees", "below", "above" or "undecided".
    """

    word: str
    difference: Interval  # ours minus published; two-sided 90%, as for two tests at 5%
    margin: float


def difference(scores: npt.ArrayLike, target: float, confidence: float) -> Interval:
    """Mean of scores (seeds, episodes) minus a fixed target, with its interval.

    Over episodes for one seed (this trained model, on new tasks), else over seeds and the episodes
    that they share (this algorithm, trained again).
    """
    values = stats.finite(scores, "scores", 2)
    if len(values) == 1:
        return stats.mean_interval(values[0] - target, confidence)
    return stats.hierarchical_difference(values, np.full_like(values, target), confidence).interval


def judge(scores: npt.ArrayLike, target: float, margin: float, half_95: float = 0.0) -> Verdict:
    """Hold scores (seeds, episodes) against a published figure.

    1. *agrees*: two one-sided t tests at 5% (Schuirmann 1987) find the difference within the
       margin; that is, its 90% interval lies inside. The published figure is taken as exact here:
       the margin allows for its interval.
    2. else *below* or *above*: the difference's 95% interval excludes zero, also when widened by
       the published one (``half_95``), the two half-widths added as squares.
    3. else *undecided*: more seeds or episodes are needed to tell.
    """
    within = difference(scores, target, 0.90)
    if -margin < within.low and within.high < margin:
        return Verdict("agrees", within, margin)
    apart = difference(scores, target, 0.95)
    half = math.hypot(apart.half_width, half_95)
    if apart.estimate + half < 0:
        return Verdict("below", within, margin)
    if apart.estimate - half > 0:
        return Verdict("above", within, margin)
    return Verdict("undecided", within, margin)


@dataclass(frozen=True)
class Outcome:
    """What a recipe came to.

    Attributes:
        recipe: the recipe.
        scale: share of the published iterations.
        folder: of its run; sweeps beside it are in folders of their names there.
        cells: the cells of its sweeps by name, the recipe's own under ``""``.
        records: its own cells, complete, one a seed.
    """

    recipe: Recipe
    scale: float
    folder: Path
    cells: dict[str, list[Cell]]
    records: list[Record]

    @cached_property
    def by_step(self) -> npt.NDArray[np.float64]:
        """Scores ``(seeds, episodes, steps + 1)``, in the figure's unit."""
        run = Run(self.folder)
        return self.unit * np.stack([run.scores_by_step(record.cell) for record in self.records])

    @property
    def scores(self) -> npt.NDArray[np.float64]:
        """Scores ``(seeds, episodes)`` after the figure's step."""
        return self.by_step[..., -1 if self.recipe.step is None else self.recipe.step]

    @property
    def unit(self) -> float:
        """What scores are multiplied by: published accuracies are in per cent."""
        return 100.0 if published()[self.recipe.published].metric == "accuracy" else 1.0

    @property
    def ours(self) -> Interval:
        """Our figure with its 95% interval."""
        return difference(self.scores, 0.0, 0.95)

    @property
    def verdict(self) -> Verdict:
        """Ours against the published figure."""
        theirs = published()[self.recipe.published]
        return judge(self.scores, theirs.value, self.recipe.margin, theirs.half_95)

    def lines(self) -> list[str]:
        """Ours beside theirs, for people."""
        theirs, ours, verdict = published()[self.recipe.published], self.ours, self.verdict
        metric, within = theirs.metric, verdict.difference
        low, high = (figure(metric, bound, signed=True) for bound in (within.low, within.high))
        margin = figure(metric, verdict.margin)
        iterations = self.records[0].cell.iterations
        steps = self.recipe.step
        lines = [
            self.recipe.title + ("" if steps is None else f", after {steps} inner step"),
            f"ours:       {figure(metric, ours.estimate, ours.half_width)} ({self.speaks_of})",
            f"published:  {theirs} {theirs.source}",
            f"difference: {figure(metric, within.estimate, signed=True)}, 90% interval "
            f"[{low}, {high}], margin ±{margin}",
            f"verdict:    {_EXPLAINED[verdict.word].format(margin=margin)}",
        ]
        if self.scale != 1:
            lines.append(
                f"scale:      {self.scale:g} of the published iterations ({iterations:,}): the "
                "verdict is on that, not on the recipe"
            )
        if theirs.certainty != "sure":
            lines.append("note:       the published figure is quoted from memory")
        if self.recipe.caveat:
            lines.append(f"caveat:     {self.recipe.caveat}")
        return lines

    @property
    def speaks_of(self) -> str:
        """What our interval is over."""
        seeds, episodes = self.scores.shape
        if seeds == 1:
            return f"95% over {episodes} test episodes: one trained model"
        return f"95% over {seeds} seeds and {episodes} test episodes: the algorithm"

    def write(self, keep: Path | None) -> list[Path]:
        """Draw the figures that belong to it, and note it in a folder; the paths of both.

        Raises:
            BenchError: a folder that cannot be written.
        """
        from bench import waves  # figures take seconds to import

        on_waves = self.records[0].cell.dataset == "sinusoid"
        drawn = waves.draw(self.cells, self.folder) if on_waves else []
        if keep is None:
            return drawn
        scaled = "" if self.scale == 1 else f"-x{self.scale:g}"
        path = keep / f"{self.recipe.name}{scaled}.json"
        try:
            keep.mkdir(parents=True, exist_ok=True)
            write_text(path, to_json(self.reference()))
        except OSError as error:
            raise BenchError(f"cannot write to {keep}: {error.strerror}") from error
        return [*drawn, path]

    def learning(self) -> list[float]:
        """Score on training tasks after adaptation, the mean over each tenth of the training."""
        run = Run(self.folder)
        logs = [run.table(record.cell, TRAINING) for record in self.records]
        metric = self.unit * np.mean([log["metric"] for log in logs], axis=0)
        return [float(part.mean()) for part in np.array_split(metric, 10) if part.size]

    def core_hours(self) -> float:
        """Processor time of a seed's training: that of a measured meta-step, times the iterations.
        Unlike seconds, it does not grow with what else the machine had to do."""
        run = Run(self.folder)
        logs = [run.table(record.cell, PERFORMANCE) for record in self.records]
        steps = pd.concat(log[log["phase"] == STEP] for log in logs)
        return float(steps["process_seconds"].median()) * self.records[0].cell.iterations / 3600

    def reference(self) -> dict[str, Any]:
        """What is kept of it: figures, seeds, and the commit and machine that made them."""
        ours, first = self.ours, self.records[0]
        return {
            "recipe": self.recipe.name,
            "scale": self.scale,
            "iterations": first.cell.iterations,
            "metric": published()[self.recipe.published].metric,
            "mean": ours.estimate,
            "half_width": ours.half_width,
            "interval": ours.over,
            "seeds": [record.cell.seed for record in self.records],
            "seed_means": self.scores.mean(axis=1).tolist(),
            "episodes": self.scores.shape[1],
            "by_step": self.by_step.mean(axis=(0, 1)).tolist(),
            "learning": self.learning(),
            "verdict": self.verdict.word,
            "train_seconds": [record.figures["train_seconds"] for record in self.records],
            "train_core_hours": self.core_hours(),
            "device": first.cell.device,
            "source": first.source,
            "environment": makers(record.figures for record in self.records),
        }


_EXPLAINED = {
    "agrees": "agrees: two one-sided t tests at 5% find the difference within ±{margin}",
    "below": "below: the 95% interval of the difference, widened by the published one, is below 0",
    "above": "above: the 95% interval of the difference, widened by the published one, is above 0",
    "undecided": "undecided: neither shown to be within ±{margin} nor to differ",
}


def outcome(
    recipe: Recipe, scale: float, cells: dict[str, list[Cell]], folder: Path
) -> Outcome | None:
    """What a recipe's sweeps came to; None where a cell of its own is missing. One beside it, such
    as a baseline that diverged, may be: it is not drawn."""
    found = (Run(folder).record(cell.id, thorough=True) for cell in cells[""])
    records = [record for record in found if record]
    if len(records) < len(cells[""]):
        return None
    return Outcome(recipe, scale, folder, cells, records)


def figure(metric: str, value: float, half: float | None = None, *, signed: bool = False) -> str:
    """A figure for people: an accuracy in per cent, or an error."""
    digits = 2 if metric == "accuracy" else 3
    plus = "+" if signed else ""
    return f"{value:{plus}.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


# What is kept


def references() -> list[dict[str, Any]]:
    """What was kept, in the order of the recipes' names."""
    files = sorted((results() / "reference").glob("*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in files]


def reference_figure(reference: dict[str, Any]) -> str:
    """A kept figure with its interval and what that is over."""
    ours = figure(reference["metric"], reference["mean"], reference["half_width"])
    seeds = len(reference["seeds"])
    return f"{ours} ({f'{seeds} seeds' if seeds > 1 else 'one model'})"


def markdown(kept: Iterable[dict[str, Any]]) -> str:
    """The table of what was reproduced, for a README."""
    lines = [
        "| result | published | ours | iterations | verdict |",
        "| --- | --- | --- | --- | --- |",
    ]
    for reference in kept:
        recipe = read(reference["recipe"])
        step = "" if recipe.step is None else f", after {recipe.step} inner step"
        share = "" if reference["scale"] == 1 else f" ({reference['scale']:g} of the paper's)"
        cells = (
            recipe.title + step,
            str(published()[recipe.published]),
            reference_figure(reference),
            f"{reference['iterations']:,}{share}",
            reference["verdict"] + (", not the same tasks" if recipe.caveat else ""),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def learning_markdown(kept: Iterable[dict[str, Any]]) -> str:
    """The table of how scores grew in training, by tenths of it."""
    tenths = " | ".join(f"{tenth}" for tenth in range(1, 11))
    lines = [f"| result, tenth of training | {tenths} |", "| --- |" + " --- |" * 10]
    for reference in kept:
        title, metric = read(reference["recipe"]).title, reference["metric"]
        if reference["scale"] != 1:
            title += f", {reference['scale']:g} of the iterations"
        shown = [figure(metric, value) for value in reference["learning"]]
        lines.append(f"| {' | '.join([title, *shown])} |")
    return "\n".join(lines) + "\n"


def listing() -> list[dict[str, str]]:
    """One row a recipe: ``recipe``, ``published``, ``ours``, and what a seed's training costs in
    full on a ``cpu`` and on a ``gpu``; what was not run is empty."""
    latest: dict[str, dict[str, Any]] = {}
    for reference in sorted(references(), key=lambda reference: float(reference["scale"])):
        latest[reference["recipe"]] = reference  # the one of the largest scale
    rows = []
    for name in names():
        theirs = published()[read(name).published]
        row = {"recipe": name, "published": figure(theirs.metric, theirs.value, theirs.half_width)}
        row |= {"ours": "", "cpu": "", "gpu": ""}
        if name in latest:
            reference = latest[name]
            scale = reference["scale"]
            row["ours"] = reference_figure(reference) + ("" if scale == 1 else f" at {scale:g}")
            if reference["device"] == "cpu":
                row["cpu"] = f"{reference['train_core_hours'] / scale:.1f} core hours"
            else:
                hours = np.mean(reference["train_seconds"]) / scale / 3600
                row["gpu"] = f"{hours:.1f} h"
        rows.append(row)
    return rows
