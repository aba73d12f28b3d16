"""What a run found, as tables: records -> tables -> pictures.

A row of the leaderboard, an *entry*, is one algorithm under one group of settings, over its seeds.
Two entries are comparable in so far as their settings agree; the settings that decide this are
:data:`FAIRNESS`, and whoever shows the leaderboard shows those of them that vary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from bench.errors import BenchError, DamagedError, printable
from bench.measure import GROWTH
from bench.naming import SETTING, in_order, names, said, varied
from bench.reading import read_columns
from bench.results import COUNTS, Entrant, Result, entrants, labels, load, why
from bench.stats import Over, mean_interval
from bench.store import TRAINING, Record, Run, outcome
from bench.sweep import Cell, Sweep, read_sweep

FAIRNESS = (
    *("test_shots", "train_shots", "inner_steps", "eval_steps", "norm", "meta_batch"),
    *("iterations", "episodes", "eval_seed", "protocol", "model", "engine", "precision"),
    "source",
)
"""Settings that change what a score means: a table over unlike ones shows them."""

COSTS = {
    "step_ms": ("time of a meta-step, ms", 1.0),
    "eval_ms_per_episode": ("time to adapt to and score an episode, ms", 1.0),
    "train_seconds": ("training time, s", 1.0),
    "peak_memory_bytes": ("peak memory, MiB", 2.0**20),
    "step_gflops": ("work of a meta-step, GFLOP", 1.0),
}
"""What an entry costs, the median over its seeds: its name and unit as shown, and that unit."""

POINTS = 60
"""Points of a learning curve: a page with 2,000 cells stays small, and no eye sees more."""

TRAINED = ("iteration", "seconds", "metric")
CURVE = ("step", "mean", "low", "high")
SENSITIVITY = ("axis", "value", "line", "mean", "low", "high")
LEARNING = ("of", "iteration", "seconds", "mean", "low", "high")

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Tables:
    """All that a report shows.

    Attributes:
        leaderboard: one row an entry, better ones first within a setting: ``entry``, ``label``, the
            settings, ``seeds``, ``failed`` (seeds that came to nothing), ``diverged`` (those of
            them whose training diverged), ``metric``, ``mean``, the half widths ``ci_seeds``,
            ``ci_episodes`` and ``ci95_classes``, the headline interval ``low``, ``high`` and what
            it is ``over``, the costs, and ``pareto_<cost>``.
        adaptation: ``entry``, ``step``, ``mean``, ``low``, ``high``: after 0, 1, ... inner
            steps, with the interval over episodes (these trained models, on new tasks).
        learning: ``entry``, ``of`` (training or validation), ``iteration``, ``seconds``, ``mean``,
            and the ``low``-est and ``high``-est seed.
        growth: ``entry``, ``step`` (inner steps of a meta-step), ``mean``, ``low``, ``high``: peak
            MiB of one on few tasks, the mean, lowest and highest of the seeds.
        sensitivity: ``entry``, ``axis`` (a setting that was swept), ``value``, ``line`` (what is
            held fixed: the algorithm and its other swept settings), ``mean`` and the headline
            interval's ``low`` and ``high``.
        faults: cells that are not here: ``cell``, ``status`` (failed, diverged, damaged, missing)
            and ``reason``.
        sweep: what was asked, where ``sweep.toml`` says.
        results: the cells that all this is of.
    """

    leaderboard: pd.DataFrame
    adaptation: pd.DataFrame
    learning: pd.DataFrame
    growth: pd.DataFrame
    sensitivity: pd.DataFrame
    faults: pd.DataFrame
    sweep: Sweep | None
    results: Sequence[Result] = ()


@dataclass(frozen=True, eq=False)
class _Loaded:
    """A complete cell: its result, its learning curve (columns by name) and the peak MiB of a
    meta-step by its inner steps."""

    result: Result
    learning: dict[str, npt.NDArray[Any]]
    growth: dict[float, float]

    @property
    def record(self) -> Record:
        return self.result.record

    @property
    def scores(self) -> Floats:
        return self.result.by_step


def read(run: Run) -> Tables:
    """The tables of a run; cells that cannot be read are named among the faults.

    Raises:
        BenchError: there is no run in the folder.
    """
    if not run.cells.is_dir() and not (run.folder / "sweep.toml").is_file():
        raise BenchError(f"{run.folder} is not a run: it has neither cells nor a sweep.toml")
    loaded, faults = _load_all(run)
    failed = list(_failures(run))
    called = names([*(one.record.cell for one in loaded), *(cell for cell, *_ in failed)])
    faults += [(called[cell.id], status, reason) for cell, status, reason in failed]
    try:
        sweep = read_sweep(run.folder / "sweep.toml", {})
    except BenchError as error:
        sweep = None
        faults.append(("sweep.toml", "damaged", str(error)))
    if sweep is not None:
        there = [one.record.cell for one in loaded] + [cell for cell, *_ in failed]
        faults += [(name, "missing", "not made yet") for name in missing(sweep, there)]
    groups = _groups(loaded)
    leaderboard = _leaderboard(groups, [(cell, status) for cell, status, _ in failed])
    members = {i: groups[key] for i, key in enumerate(leaderboard["key"]) if key is not None}
    return Tables(
        leaderboard.drop(columns="key"),
        _stacked({entry: _adaptation(group) for entry, group in members.items()}, CURVE),
        _learning(members),
        _stacked({entry: _growth(group) for entry, group in members.items()}, CURVE),
        _sensitivity(leaderboard, members),
        pd.DataFrame(faults, columns=["cell", "status", "reason"]),
        sweep,
        [one.result for one in loaded],
    )


# Reading


def _load_all(run: Run) -> tuple[list[_Loaded], list[tuple[str, str, str]]]:
    """The cells that can be read, and the faults of those that cannot."""
    loaded, faults = [], []
    for name in run.cell_ids():
        found = _load(run, name)
        if isinstance(found, str):
            cell, place = run.described(name), f"cells/{printable(name)}"
            faults.append((f"{cell} ({place})" if cell else place, "damaged", found))
        else:
            loaded.append(found)
    return loaded, faults


def _load(run: Run, cell_id: str) -> _Loaded | str:
    """A cell's tables, or what is wrong with them."""
    try:
        found = load(run, cell_id)
    except DamagedError as error:
        return str(error)
    path, rows = run.cells / cell_id / TRAINING, found.cell.iterations
    try:
        training = read_columns(path, *TRAINED, rows=rows, optional=["val_metric"])
        return _Loaded(found, _curve(training), _peaks(found))
    except Exception as error:  # a file of other hands can fail its reader in any way
        return why(error)


def _peaks(found: Result) -> dict[float, float]:
    """Peak MiB of a meta-step by its inner steps; empty where that was not measured."""
    costs = found.performance
    if "inner_steps" not in costs:
        return {}
    grown = costs["phase"] == GROWTH
    steps, peaks = (costs[name][grown].astype(float) for name in ("inner_steps", "peak_bytes"))
    known = ~np.isnan(peaks)
    return dict(zip(steps[known].tolist(), (peaks[known] / 2**20).tolist(), strict=True))


def _curve(training: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """At most :data:`POINTS` bins of a training, and its validations: ``of``, ``iteration``,
    ``seconds`` of training so far, ``value``."""
    count, seconds = len(training["metric"]), training["seconds"].cumsum()
    ends = np.unique(np.linspace(0, count, min(POINTS, count) + 1).astype(int))[1:]
    starts = np.concatenate([[0], ends[:-1]])
    binned = np.add.reduceat(training["metric"], starts) / (ends - starts)
    validated = training.get("val_metric", np.empty(0))
    at = np.flatnonzero(~np.isnan(validated))
    at = at[np.unique(np.linspace(0, len(at) - 1, min(POINTS, len(at))).astype(int))]
    shown = np.concatenate([ends - 1, at])
    return {
        "of": np.repeat(["training", "validation"], [len(ends), len(at)]),
        "iteration": training["iteration"][shown],
        "seconds": seconds[shown],
        "value": np.concatenate([binned, validated[at]]),
    }


def _failures(run: Run) -> Iterator[tuple[Cell, str, str]]:
    """The cells that came to nothing, whether they failed or diverged, and why."""
    for failure in run.failures().values():
        yield Cell(**failure["settings"]), outcome(failure)["status"], failure["reason"]


def missing(sweep: Sweep, there: Sequence[Cell]) -> list[str]:
    """What was asked for and is not there, by the axes of the sweep.

    Axes, not cell ids: those would need the sweep's plug-in, and a report runs nobody's code.
    """
    points = [
        [(name, value) for value in values] for name, values in sweep.set.items() if len(values) > 1
    ]
    asked: Iterator[tuple[Any, ...]] = (
        (dataset, *rest)
        for dataset in sweep.datasets
        for rest in product(
            *(sweep.ways_of(dataset), sweep.shots, sweep.seeds, sweep.devices, sweep.algos),
            *points,
        )
    )
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for c in there:
        place = (c.dataset, c.ways, c.shots, c.seed, c.device, c.algorithm)
        found.setdefault(place, []).append(c.row())
    gone = []
    for dataset, ways, shots, seed, device, algorithm, *swept in asked:
        rows = found.get((dataset, ways, shots, seed, device, algorithm), [])
        if not any(_is_at(row, swept) for row in rows):
            own = ", ".join(f"{name} {said(value)}" for name, value in swept)
            name = f"{algorithm} {dataset} {ways}-way {shots}-shot seed {seed}"
            gone.append(f"{name} ({own})" if own else name)
    return gone


def _is_at(row: dict[str, Any], point: Sequence[tuple[str, Any]]) -> bool:
    """Whether a cell has these settings; those that its algorithm does not have, it has anyhow."""
    return all(
        row[name] == value or said(row[name]) == said(value) for name, value in point if name in row
    )


# Entries


def _groups(loaded: Sequence[_Loaded]) -> dict[Entrant, list[_Loaded]]:
    """The cells of each entry: those that differ in nothing but the seed."""
    by_result = {one.result: one for one in loaded}
    field = entrants(one.result for one in loaded)
    return {one: [by_result[result] for result in one.by_seed.values()] for one in field}


def _settings(cell: Cell) -> dict[str, Any]:
    settings = cell.model_dump(exclude={"seed", "hyperparameters"})
    return settings | cell.hyperparameters


def _leaderboard(
    groups: dict[Entrant, list[_Loaded]], failed: Sequence[tuple[Cell, str]]
) -> pd.DataFrame:
    """One row an entrant, in ``key``, and one, without a key, for failed cells that have none."""
    failures: dict[str, list[Cell]] = {}
    lost = [cell for cell, _ in failed]
    for cell in lost:
        failures.setdefault(cell.seedless_id, []).append(cell)
    diverged = Counter(cell.seedless_id for cell, status in failed if status == "diverged")
    names, lost_names = labels(list(groups), lost)
    called = {cell.seedless_id: name for cell, name in zip(lost, lost_names, strict=True)}
    rows: list[dict[str, Any]] = []
    for entrant, group in groups.items():
        kind = group[0].record.cell.seedless_id
        counts = {"failed": len(failures.pop(kind, [])), "diverged": diverged[kind]}
        rows.append({"key": entrant, "label": names[entrant], **_entry(group), **counts})
    for kind, cells in failures.items():
        cell = cells[0]
        counts = {"failed": len(cells), "diverged": diverged[kind]}
        failure = {"key": None, "label": called[kind], "seeds": 0, **counts}
        rows.append(failure | _settings(cell))
    columns = [
        "key",
        "label",
        "algorithm",
        *SETTING,
        *FAIRNESS,
        "seeds",
        "failed",
        "diverged",
        "metric",
        "mean",
    ]
    columns += ["ci_seeds", "ci_episodes", "ci95_classes", "low", "high", "over", *COSTS, *COUNTS]
    frame = pd.DataFrame(rows)
    frame = frame.reindex(columns=list(dict.fromkeys([*frame.columns, *columns])))
    frame = best_first(frame, "label")
    frame.insert(0, "entry", frame.index)
    for cost in COSTS:
        frame[f"pareto_{cost}"] = False
        for _, members in frame.groupby(list(SETTING), sort=False):
            frame.loc[members.index, f"pareto_{cost}"] = pareto(members[cost], members["merit"])
    return frame.drop(columns="merit")


def best_first(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """Rows by setting, in each the best first, and equals by the column ``name``; with a column
    ``merit``, of which more is better."""
    merit = frame["mean"].where(frame["metric"] == "accuracy", -frame["mean"])
    order = [True] * len(SETTING) + [False, True]
    by = [*SETTING, "merit", name]
    return frame.assign(merit=merit).sort_values(by, ascending=order, ignore_index=True)


def _entry(group: Sequence[_Loaded]) -> dict[str, Any]:
    """Settings, score and costs of one entry."""
    first = group[0].record
    means = np.array([one.record.figures["mean"] for one in group])
    over_seeds = _half_width(means, "seeds")
    over_episodes = _half_width(np.mean([one.scores[:, -1] for one in group], axis=0), "episodes")
    half = over_episodes if math.isnan(over_seeds) else over_seeds
    return {
        **_medians([one.record.row() for one in group]),
        **_settings(first.cell),
        **{
            name: first.figures.get(name, first.cell.hyperparameters.get(name))
            for name in ("engine", "precision")
        },
        "source": first.source,
        "seeds": len(group),
        "metric": first.figures["metric"],
        "mean": float(means.mean()),
        "ci_seeds": over_seeds,
        "ci_episodes": over_episodes,
        "low": float(means.mean()) - half,
        "high": float(means.mean()) + half,
        "over": "episodes" if math.isnan(over_seeds) else "seeds",
    }


def _medians(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The median of each number that rows have, but the seed, over those that have it."""
    found = {}
    for name in dict.fromkeys(name for row in rows for name in row if name != "seed"):
        values = [row[name] for row in rows if row.get(name) is not None]
        if values and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            found[name] = float(median(values))
    return found


def varying(leaderboard: pd.DataFrame) -> list[str]:
    """The settings of :data:`FAIRNESS` that are not the same for every entry that has a score.

    Training with the shots of the test is the same for all, whatever their number.
    """
    leaderboard = leaderboard[leaderboard["seeds"] > 0]
    found = [name for name in FAIRNESS if values(leaderboard[name]) > 1]
    if (leaderboard["train_shots"] == leaderboard["shots"]).all():
        found = [name for name in found if name != "train_shots"]
    return found


def values(column: pd.Series[Any]) -> int:
    """How many values a setting has; to have no such setting is none."""
    return int(column.dropna().astype(str).nunique())


def unlike(leaderboard: pd.DataFrame) -> dict[tuple[Any, ...], list[str]]:
    """By setting, in which :data:`FAIRNESS` settings its entries that have a score differ from one
    another."""
    found = {}
    scored = leaderboard[leaderboard["seeds"] > 0]
    for setting, rows in scored.groupby(list(SETTING), sort=False):
        differing = [name for name in FAIRNESS if values(rows[name]) > 1]
        if differing:
            found[tuple(setting)] = differing
    return found


def pareto(cost: pd.Series[float], merit: pd.Series[float]) -> pd.Series[bool]:
    """Whether no other entry is at least as good for at most the cost, and better in one of both.

    Where the cost was not measured there is no telling: False.
    """
    front = pd.Series(False, index=cost.index)
    known = cost.notna() & merit.notna()
    best = -math.inf
    ordered = pd.DataFrame({"cost": cost[known], "merit": merit[known]})
    for _, tied in ordered.groupby("cost"):
        if tied["merit"].max() > best:
            best = tied["merit"].max()
            front[tied.index[tied["merit"] == best]] = True
    return front


# Curves


def _adaptation(group: Sequence[_Loaded]) -> pd.DataFrame:
    """The score after each inner step, with its interval over episodes."""
    scores = np.mean([one.scores for one in group], axis=0)
    mean = scores.mean(axis=0)
    half = np.array([_half_width(column, "episodes") for column in scores.T])
    steps = np.arange(mean.size)
    return pd.DataFrame({"step": steps, "mean": mean, "low": mean - half, "high": mean + half})


def _growth(group: Sequence[_Loaded]) -> pd.DataFrame:
    """Peak MiB by inner steps: the mean of the seeds, the lowest and the highest."""
    by_steps: dict[float, list[float]] = {}
    for one in group:
        for step, peak in one.growth.items():
            by_steps.setdefault(step, []).append(peak)
    rows = [(s, np.mean(p), min(p), max(p)) for s, p in sorted(by_steps.items())]
    return pd.DataFrame(rows, columns=list(CURVE))


def _sensitivity(leaderboard: pd.DataFrame, members: dict[int, list[_Loaded]]) -> pd.DataFrame:
    """The scores over the values of each setting that was swept, all else being equal."""
    records = {entry: group[0].record for entry, group in members.items()}
    rows = {entry: r.cell.row() | {"source": r.source} for entry, r in records.items()}
    points = []
    scored = leaderboard[leaderboard["entry"].isin(list(members))]
    for key, mine in scored.groupby([*SETTING, "algorithm"]):
        swept = varied(rows[entry] for entry in mine["entry"])
        places = {e: [in_order(rows[e].get(name)) for name in swept] for e in mine["entry"]}
        ordered = sorted(places, key=places.__getitem__)
        for axis in swept:
            lines: dict[str, list[int]] = {}
            for entry in ordered:
                others = (f"{n} {said(rows[entry].get(n))}" for n in swept if n != axis)
                own = ", ".join(others)
                lines.setdefault(f"{key[-1]} ({own})" if own else f"{key[-1]}", []).append(entry)
            for line, entries in lines.items():
                if len(entries) > 1:
                    points += [(e, axis, _plottable(rows[e].get(axis)), line) for e in entries]
    found = pd.DataFrame(points, columns=["entry", *SENSITIVITY[:3]])
    return found.merge(leaderboard[["entry", "mean", "low", "high"]], on="entry", how="left")


def _plottable(value: Any) -> float | str:
    return value if isinstance(value, int | float) else said(value)


def _learning(members: dict[int, list[_Loaded]]) -> pd.DataFrame:
    """The learning curves of each entry's seeds as one: their mean, the lowest and the highest."""
    curves = [(entry, one.learning) for entry, group in members.items() for one in group]
    if not curves:
        return pd.DataFrame(columns=["entry", *LEARNING])
    points = {
        name: np.concatenate([learning[name] for _, learning in curves]) for name in curves[0][1]
    }
    counts = [len(learning["value"]) for _, learning in curves]
    points["entry"] = np.repeat([entry for entry, _ in curves], counts)
    merged = (
        pd.DataFrame(points)
        .groupby(["entry", "of", "iteration"])
        .agg(
            seconds=("seconds", "mean"),
            mean=("value", "mean"),
            low=("value", "min"),
            high=("value", "max"),
        )
    )
    return merged.reset_index()[["entry", *LEARNING]]


def _stacked(frames: dict[int, pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    """The frames of the entries below one another, numbered in ``entry``."""
    # An empty frame has no types, and would take those of the others away.
    frames = {entry: frame for entry, frame in frames.items() if not frame.empty}
    if not frames:
        return pd.DataFrame(columns=["entry", *columns])
    stacked = pd.concat(frames, names=["entry"]).reset_index(level="entry")
    return stacked[["entry", *columns]].reset_index(drop=True)


def _half_width(values: Floats, over: Over) -> float:
    """Half of the 95% interval of a mean; NaN for one value, or for values that are not finite."""
    return mean_interval(values, over=over).half_width if np.isfinite(values).all() else math.nan
