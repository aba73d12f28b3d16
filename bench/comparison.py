"""Which algorithm is better, is that real, and what does it cost: every pair, from results.

Data flows one way: cells on disk -> results -> entrants -> rows -> sentences. Two entrants are
paired only where they met the very same test episodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence, Set
from dataclasses import asdict, dataclass, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scikit_posthocs
import seaborn as sns
from matplotlib.figure import Figure

from bench.errors import BenchError, printable
from bench.files import write_text
from bench.measure import STEP
from bench.plots import as_text, save
from bench.progress import reuse_notes
from bench.protocol import after_last_step
from bench.rankings import Ranking, friedman_nemenyi, holm
from bench.reading import read_performance
from bench.stats import (
    Difference,
    Floats,
    Over,
    PairedDifference,
    below_floor,
    episodes_to_resolve,
    finite,
    hierarchical_difference,
    mean_interval,
    paired_difference,
    paired_ratio,
    resolvable_difference,
)
from bench.store import PERFORMANCE, Record, Run
from bench.sweep import Cell, said

ALPHA = 0.05
TUNED = frozenset(
    f"{loop}_{setting}"
    for loop in ("inner", "meta")
    for setting in ("lr", "optimizer", "schedule", "clip")
)
"""Settings that each algorithm has a right to its own of, unless they were swept; any other that
two entrants do not share is named beside their difference."""
COUNTS = ("samples_per_step", "gradients_per_step")
"""What other settings come to."""


# Cells on disk -> results


@dataclass(frozen=True, eq=False)
class Result:
    """A complete cell: its record, its score in every episode and what it cost.

    Attributes:
        scores: the metric after the last inner step, ``(episodes,)``.
        performance: the rows of ``performance.parquet``; none where nothing was measured.
    """

    record: Record
    scores: Floats
    performance: pd.DataFrame

    @property
    def episodes(self) -> tuple[str, int]:
        """Which test episodes it met: results may be paired where these are equal."""
        return self.record.figures["episode_address"], len(self.scores)

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


def read(folder: Path) -> tuple[list[Result], list[str]]:
    """A run's complete cells, and the ids of those that are damaged.

    Raises:
        BenchError: a folder that holds no run, or no complete cell.
    """
    run = Run(folder)
    if not run.cells.is_dir():
        raise BenchError(f"there is no run in {folder}: it has no cells/")
    results = []
    for record in run.records():
        try:
            results.append(_result(run, record))
        except Exception:  # a file of other hands can fail its reader in any way
            continue
    damaged = sorted(set(run.cell_ids()) - {result.cell.id for result in results})
    if not results:
        also = f"; {len(damaged)} are damaged" if damaged else ""
        raise BenchError(f"{folder} has no complete cells{also}")
    return results, damaged


def _result(run: Run, record: Record) -> Result:
    scores = finite(after_last_step(run.scores(record.cell)).to_numpy(), "scores")
    if len(scores) != record.cell.episodes:
        raise ValueError(f"{len(scores)} episodes, not {record.cell.episodes}")
    path = run.cells / record.cell.id / PERFORMANCE
    columns = ["phase", "repeat", "seconds", "process_seconds", "peak_bytes", "session"]
    performance = read_performance(path) if path.exists() else pd.DataFrame(columns=columns)
    figures = record.figures
    if figures.get("metric") not in ("accuracy", "mse") or not figures.get("episode_address"):
        raise ValueError(f"{record.cell} does not say what its scores are of")
    return Result(record, scores, performance[columns])


def damage_notes(folder: Path, damaged: Sequence[str]) -> list[str]:
    """A line that names damaged cells, if there are any."""
    if not damaged:
        return []
    names = ", ".join(map(printable, damaged))
    return [f"skipped, for they are damaged: {names} in {folder}; the same 'run' makes them again"]


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

    @property
    def settings(self) -> dict[str, Any]:
        """All that decided its results but the algorithm and the seed."""
        record = self.any.record
        return (
            record.cell.model_dump(exclude={"algorithm", "seed", "hyperparameters"})
            | record.cell.hyperparameters
            | {name: getattr(record.cell, name) for name in COUNTS}
            | {"engine": record.figures.get("engine"), "source": record.source}
        )


def entrants(results: Iterable[Result]) -> list[Entrant]:
    """Results put together that differ in nothing but the seed; of equal ones, the first stays."""
    groups: dict[tuple[str, str], dict[int, Result]] = {}
    for result in results:
        cell = result.cell
        key = (cell.seedless_id, result.record.source)
        groups.setdefault(key, {}).setdefault(cell.seed, result)
    return [Entrant(by_seed) for by_seed in groups.values()]


def differing(a: Entrant, b: Entrant) -> dict[str, tuple[Any, Any]]:
    """The settings both have, with values that are not the same."""
    x, y = a.settings, b.settings
    return {name: (x[name], y[name]) for name in x if name in y and x[name] != y[name]}


def telling(field: Sequence[Entrant]) -> dict[Entrant, list[str]]:
    """The settings that tell each entrant from its namesakes at its place."""
    namesakes: dict[tuple[Any, ...], list[Entrant]] = {}
    for entrant in field:
        key = (entrant.algorithm, entrant.place, entrant.any.cell.device)
        namesakes.setdefault(key, []).append(entrant)
    return {
        entrant: sorted(
            {n for other in group for n in differing(entrant, other) if n not in COUNTS}
        )
        for group in namesakes.values()
        for entrant in group
    }


def labels(field: Sequence[Entrant]) -> dict[Entrant, str]:
    """A name for each entrant: its algorithm's, with what tells it from namesakes at its place."""
    names = {}
    for entrant, settings in telling(field).items():
        own = ", ".join(f"{name} {said(entrant.settings[name])}" for name in settings)
        names[entrant] = f"{entrant.algorithm} ({own})" if own else entrant.algorithm
    return names


# Entrants -> rows


@dataclass(frozen=True)
class Row:
    """Entrant a against entrant b; the columns of ``comparison.csv``.

    Attributes:
        difference: mean of a - b in units of the metric (accuracies are fractions), with `low` and
            `high`, the bounds of its 95% interval.
        p, p_holm: of Student's t (over seeds: the p value of the interval), alone and corrected
            over all comparisons of the table.
        effect: Cohen's d_z.
        seeds, episodes: how many both have.
        over: what the interval speaks of: ``episodes``, these trained models on new tasks, or
            ``seeds``, the algorithms trained again.
        better: the label of the better one, empty where `p_holm` shows no difference.
        resolvable: the smallest difference found with 80% power at this correction.
        enough_for_half: how many of what `over` names would resolve half of that.
        time_ratio, time_low, time_high: meta-step of a over that of b, repeats taken in turns.
        memory_ratio: the same of peak memory.
        unlike: settings that a and b do not share, as ``name value of a / value of b``.
    """

    algorithm_a: str
    algorithm_b: str
    dataset: str
    ways: int
    shots: int
    metric: str
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    effect: float
    seeds: int
    episodes: int
    test_shots: int
    device: str
    over: Over
    better: str
    p_wilcoxon: float
    p_permutation: float
    resolvable: float
    enough_for_half: float
    time_ratio: float
    time_low: float
    time_high: float
    memory_ratio: float
    unlike: str

    def sentence(self) -> str:
        """What the row says, to someone who has to choose; the better one is named first."""
        shape = f"{self.ways}-way {self.shots}" if self.metric == "accuracy" else f"{self.shots}"
        where = f"on {self.dataset} {shape}-shot"
        turned = self.better == self.algorithm_b
        first, second = self.algorithm_a, self.algorithm_b
        if turned:
            first, second = second, first
        who = f"{first} over {second}" if self.better else f"{first} against {second}"
        parts = [f"{who} {where}: {self._difference(turned)}", f"{_p(self.p_holm)} after Holm"]
        parts += self._costs(turned)
        said = ", ".join(parts)
        if not self.better:
            said += f"; no difference shown: {self._resolution()}"
        if self.unlike:
            said += f"; unlike ({self.algorithm_a} / {self.algorithm_b}): {self.unlike}"
        return said

    def _difference(self, turned: bool) -> str:
        values = [self.difference, self.low, self.high]
        if turned:
            values = [-self.difference, -self.high, -self.low]
        over = f"over {getattr(self, self.over):,} {self.over}"
        if self.metric == "accuracy":
            mean, low, high = (100 * value for value in values)
            return f"{mean:+.1f} points [{low:.1f}, {high:.1f}] {over}"
        mean, low, high = values
        return f"{mean:+.3g} {self.metric} (lower is better) [{low:.3g}, {high:.3g}] {over}"

    def _costs(self, turned: bool) -> list[str]:
        time = [self.time_ratio, self.time_low, self.time_high]
        memory = self.memory_ratio
        if turned:
            time = [1 / time[0], 1 / time[2], 1 / time[1]]
            memory = 1 / memory
        said = []
        if not math.isnan(time[0]):
            interval = "" if math.isnan(time[1]) else f" [{time[1]:.1f}, {time[2]:.1f}]"
            said.append(f"{time[0]:.1f}x the time{interval}")
        if not math.isnan(memory):
            said.append(f"{memory:.1f}x the memory")
        return said or ["costs not measured in turns"]

    def _resolution(self) -> str:
        if self.resolvable == 0:
            return "they score alike throughout"
        scale, unit = (100.0, " points") if self.metric == "accuracy" else (1.0, "")
        now, half = scale * self.resolvable, scale * self.resolvable / 2
        count = getattr(self, self.over)
        return (
            f"{count:,} {self.over} can resolve {now:.2g}{unit}; "
            f"{self.enough_for_half:,.0f} would resolve {half:.2g}"
        )


COLUMNS = tuple(field.name for field in fields(Row))


@dataclass(frozen=True)
class Comparison:
    """What runs show: a row a pair, the ranks over settings where there are any, and what a reader
    must know besides."""

    rows: list[Row]
    ranks: Ranks | None
    notes: list[str]

    @property
    def table(self) -> pd.DataFrame:
        """The rows, with the columns :data:`COLUMNS`."""
        return pd.DataFrame([asdict(row) for row in self.rows], columns=list(COLUMNS))

    def lines(self) -> list[str]:
        """The comparison for a terminal."""
        heading = (
            f"{len(self.rows)} comparisons on shared test episodes; p is corrected over all of "
            "them. Intervals are 95%, each for itself: over episodes they speak of these trained "
            "models on new tasks, over seeds of the algorithms trained again. Time and memory are "
            "a meta-step's."
        )
        ranks = [self.ranks.sentence()] if self.ranks else []
        return [heading, *(row.sentence() for row in self.rows), *ranks, *self.notes]

    def write(self, folder: Path) -> list[Path]:
        """Write ``comparison.csv``, and the critical-difference diagram where there are ranks.

        Raises:
            BenchError: a folder that cannot be written.
        """
        run = Run(folder)
        table = folder / "comparison.csv"
        try:
            write_text(table, self.table.to_csv(index=False))
            if self.ranks is None:
                return [table]
            return [table, *save(self.ranks.diagram(), run.figures / "critical_difference")]
        except OSError as error:
            raise BenchError(f"cannot write to {folder}: {error.strerror}") from error


def compare(folders: Sequence[Path], accept_changed_code: bool = False) -> Comparison:
    """Every pair of entrants of some runs that met the same test episodes.

    Args:
        folders: the runs.
        accept_changed_code: compare cells that different source made.

    Raises:
        BenchError: a folder without results, cells of different source, or nothing to compare.
    """
    results: list[Result] = []
    notes: list[str] = []
    for folder in folders:
        found, damaged = read(folder)
        results += found
        notes += damage_notes(folder, damaged)
    sources = sorted({result.record.source for result in results})
    if len(sources) > 1 and not accept_changed_code:
        raise BenchError(
            f"the cells were made by different source code ({', '.join(sources)}); "
            "--accept-changed-code compares them all the same"
        )
    if len(sources) > 1:
        notes.append(f"these cells were made by different source code: {', '.join(sources)}")
    field = entrants(results)
    names = labels(field)
    pairs, left_out = _pair_up(field, names)
    if not pairs:
        why = left_out[0] if left_out else f"all cells are of {field[0].algorithm}, set up alike"
        raise BenchError(f"there is nothing to compare: {why}")
    own = TUNED - {name for settings in telling(field).values() for name in settings}
    rows = [_row(a, b, names, own, ALPHA / len(pairs)) for a, b in pairs]
    notes += [*left_out, *_doubts(results), *_reuse(results)]
    return Comparison(_corrected(rows), rank(field, names), notes)


def _pair_up(
    field: Sequence[Entrant], names: dict[Entrant, str]
) -> tuple[list[tuple[Entrant, Entrant]], list[str]]:
    """The pairs that can be compared, and why others, at the same place, cannot."""
    pairs = []
    obstacles: dict[str, list[str]] = {}
    for a, b in combinations(field, 2):
        if a.place != b.place:
            continue
        obstacle = _obstacle(a, b)
        if obstacle is None:
            pairs.append((a, b))
        else:
            dataset, ways, shots = a.place
            key = f"on {dataset} {ways}-way {shots}-shot, {obstacle}"
            obstacles.setdefault(key, []).append(f"{names[a]} and {names[b]}")
    return pairs, [f"left out: {'; '.join(who)} {why}" for why, who in obstacles.items()]


def _obstacle(a: Entrant, b: Entrant) -> str | None:
    """What keeps two entrants from being paired, episode by episode."""
    x, y = a.any, b.any
    if x.episodes != y.episodes:
        met = [f"{count} of {address}" for address, count in (x.episodes, y.episodes)]
        return f"which met other test episodes: {met[0]}, against {met[1]}"
    if x.cell.device != y.cell.device:
        return f"which ran on {x.cell.device} and {y.cell.device}"
    if not a.by_seed.keys() & b.by_seed.keys():
        return f"which have no seed in common: {sorted(a.by_seed)}, against {sorted(b.by_seed)}"
    return None


def _row(a: Entrant, b: Entrant, names: dict[Entrant, str], own: Set[str], alpha: float) -> Row:
    """Entrant a against b; ``own`` are settings that may differ without a word."""
    seeds = sorted(a.by_seed.keys() & b.by_seed.keys())
    x, y = (np.stack([one.by_seed[seed].scores for seed in seeds]) for one in (a, b))
    found: Difference
    if len(seeds) == 1:
        found = paired_difference(x[0], y[0])
        sampled = (x - y)[0]
    else:
        found = hierarchical_difference(x, y)
        sampled = (x - y).mean(axis=1)
    resolvable = resolvable_difference(sampled, alpha=alpha)
    needed = episodes_to_resolve(sampled, resolvable / 2, alpha=alpha) if resolvable else math.nan
    paired = found if isinstance(found, PairedDifference) else None
    cell = a.any.cell
    unlike = {n: both for n, both in differing(a, b).items() if n not in own}
    return Row(
        algorithm_a=names[a],
        algorithm_b=names[b],
        dataset=cell.dataset,
        ways=cell.ways,
        shots=cell.shots,
        metric=a.any.metric,
        difference=found.interval.estimate,
        low=found.interval.low,
        high=found.interval.high,
        p=found.p,
        p_holm=math.nan,
        effect=found.effect,
        seeds=found.seeds,
        episodes=found.episodes,
        test_shots=cell.test_shots,
        device=cell.device,
        over=found.interval.over,
        better="",
        p_wilcoxon=paired.p_wilcoxon if paired else math.nan,
        p_permutation=paired.p_permutation if paired else math.nan,
        resolvable=resolvable,
        enough_for_half=needed,
        **_cost_ratios([(a.by_seed[seed], b.by_seed[seed]) for seed in seeds]),
        unlike=", ".join(f"{n} {said(x)} / {said(y)}" for n, (x, y) in unlike.items()),
    )


def _cost_ratios(pairs: Sequence[tuple[Result, Result]]) -> dict[str, float]:
    """Time and memory of a meta-step, a over b: repeats of one session, which took turns."""
    both = pd.concat([_paired_repeats(a, b) for a, b in pairs])
    ratios = dict.fromkeys(("time_ratio", "time_low", "time_high", "memory_ratio"), math.nan)
    if not both.empty:
        time = paired_ratio(both["seconds_a"], both["seconds_b"])
        ratios |= {"time_ratio": time.estimate, "time_low": time.low, "time_high": time.high}
    peaks = both[["peak_bytes_a", "peak_bytes_b"]].astype(float)
    peaks = peaks[(peaks > 0).all(axis=1)]  # what was not measured is not a number
    if not peaks.empty:
        memory = paired_ratio(peaks["peak_bytes_a"], peaks["peak_bytes_b"])
        ratios["memory_ratio"] = memory.estimate
    return ratios


def _paired_repeats(a: Result, b: Result) -> pd.DataFrame:
    steps = [r.performance[r.performance["phase"] == STEP] for r in (a, b)]
    return steps[0].merge(steps[1], on=["session", "repeat"], suffixes=("_a", "_b"))


def _corrected(rows: Sequence[Row]) -> list[Row]:
    """The rows with Holm's correction over all of them, and who is better by it."""
    corrected = []
    for row, p in zip(rows, holm([row.p for row in rows]), strict=True):
        a_leads = (row.difference > 0) == (row.metric == "accuracy")
        leader = row.algorithm_a if a_leads else row.algorithm_b
        corrected.append(replace(row, p_holm=float(p), better=leader if p < ALPHA else ""))
    return corrected


def _doubts(results: Sequence[Result]) -> list[str]:
    """Cells whose accuracies vary less than coin tosses would."""
    return [
        f"doubtful: {result.cell} varies less from episode to episode than chance allows"
        for result in results
        if result.metric == "accuracy"
        and below_floor(mean_interval(result.scores), result.cell.ways * result.cell.test_shots)
    ]


def _reuse(results: Sequence[Result]) -> list[str]:
    rows = pd.DataFrame([result.record.row() for result in results])
    return reuse_notes(rows) if "sample_reuse" in rows else []


# Many settings at once


@dataclass(frozen=True)
class Ranks:
    """Where each algorithm comes, over settings."""

    names: list[str]
    settings: int
    ranking: Ranking

    def sentence(self) -> str:
        """Mean ranks, best first, and what they are worth."""
        order = sorted(zip(self.ranking.mean_ranks, self.names, strict=True))
        ranks = ", ".join(f"{name} {mean:.1f}" for mean, name in order)
        doubt = "; exploratory: so few settings are a hint at most"
        return (
            f"mean ranks over {self.settings} settings: {ranks}; Friedman {_p(self.ranking.p)}"
            f"{doubt if self.ranking.exploratory else ''}"
        )

    def diagram(self) -> Figure:
        """The critical-difference diagram (Demsar 2006): bars join what Nemenyi's test does not
        tell apart."""
        sns.set_theme(style="white", palette="colorblind", font_scale=0.9)
        figure = Figure(figsize=(7, 1.4 + 0.25 * len(self.names)), layout="constrained")
        axis = figure.subplots()
        names = [as_text(name) for name in self.names]
        scikit_posthocs.critical_difference_diagram(
            pd.Series(self.ranking.mean_ranks, names),
            pd.DataFrame(self.ranking.nemenyi, names, names),
            ax=axis,
            color_palette=["black"] * len(self.names),
        )
        exploratory = ", exploratory" if self.ranking.exploratory else ""
        axis.set_title(
            f"mean rank over {self.settings} settings, 1 is best; joined: no difference shown "
            f"(Nemenyi{exploratory})",
            fontsize="small",
        )
        return figure


def rank(field: Sequence[Entrant], names: dict[Entrant, str]) -> Ranks | None:
    """The ranks of the algorithms that met every setting, on seeds that they share there.

    None for fewer than three algorithms or two settings.
    """
    blocks: dict[tuple[Any, ...], dict[str, Entrant]] = {}
    for entrant in field:
        blocks.setdefault((entrant.place, entrant.any.episodes), {}).setdefault(
            names[entrant], entrant
        )
    first, *others = blocks.values()
    shared = [name for name in first if all(name in block for block in others)]
    scores = [row for block in blocks.values() if (row := _scores(block, shared))]
    if len(shared) < 3 or len(scores) < 2:
        return None
    return Ranks(shared, len(scores), friedman_nemenyi(scores))


def _scores(block: dict[str, Entrant], names: Sequence[str]) -> list[float]:
    """Mean scores in one setting, higher is better; empty where no seed is shared."""
    members = [block[name] for name in names]
    seeds = set.intersection(*(set(one.by_seed) for one in members)) if members else set()
    if not seeds:
        return []
    sign = 1 if members[0].any.higher_is_better else -1
    return [sign * float(np.mean([one.by_seed[s].scores for s in seeds])) for one in members]


def _p(p: float) -> str:
    """A p value for people."""
    return "p < 0.0001" if p < 0.0001 else f"p = {float(f'{p:.2g}'):.4g}"
