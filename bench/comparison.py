"""Which algorithm is better, is that real, and what does it cost: every pair, from results.

Data flows one way: results -> entrants (`bench.results`) -> rows -> sentences. Two entrants are
paired only where they met the very same test episodes.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.errors import BenchError
from bench.files import write_text
from bench.naming import names as cell_names
from bench.naming import said, varied
from bench.overall import Aggregate, Block, Ranks, aggregate, rank, said_p
from bench.plots import save
from bench.rankings import holm
from bench.results import (
    COUNTS,
    Entrant,
    Result,
    damage_notes,
    differing,
    entrants,
    labels,
    left_out_notes,
    of_other_data,
    read,
)
from bench.stats import (
    Difference,
    Over,
    PairedDifference,
    below_floor,
    episodes_to_resolve,
    hierarchical_difference,
    mean_interval,
    paired_difference,
    paired_ratio,
    resolvable_difference,
    resolvable_over_seeds,
    seeds_to_resolve,
)
from bench.store import Run
from bench.summary import reuse_notes
from bench.sweep import Cell
from bench.wording import counted, decimals

ALPHA = 0.05
TUNED = frozenset(
    f"{loop}_{setting}"
    for loop in ("inner", "meta")
    for setting in ("lr", "optimizer", "schedule", "clip")
)
"""Settings that each algorithm has a right to its own of, unless they were swept; any other that
two entrants do not share is named beside their difference."""
MOST_LEFT_OUT = 10
"""Pairs that are named where they cannot be compared for the same reason."""
RESOLUTION: dict[str, tuple[Callable[..., float], Callable[..., float]]] = {
    "episodes": (resolvable_difference, episodes_to_resolve),
    "seeds": (resolvable_over_seeds, seeds_to_resolve),
}
"""By what an interval speaks of: the smallest difference that is found, and how many find one."""
TESTS = ("p", "p_wilcoxon", "p_permutation")
"""Each is corrected by Holm over all comparisons of a table."""


# Entrants -> rows


@dataclass(frozen=True)
class Row:
    """Entrant a against entrant b; the columns of ``comparison.csv``.

    Attributes:
        difference: mean of a - b in units of the metric (accuracies are fractions), with `low` and
            `high`, the bounds of its 95% interval.
        p, p_holm: of Student's t (over seeds: the p value of the interval), alone and corrected
            over all comparisons of the table.
        p_wilcoxon, p_permutation: of two tests with fewer assumptions, where there is one seed,
            and `..._holm`, corrected likewise. The permutation test's 10,000 draws give no p below
            0.0001, so that in a table of more than 500 pairs it finds nothing.
        effect: Cohen's d_z.
        seeds, episodes: how many both have.
        over: what the interval speaks of: ``episodes``, these trained models on new tasks, or
            ``seeds``, the algorithms trained again.
        better: the label of the better one, empty where `p_holm` shows no difference.
        resolvable: the smallest difference found with 80% power at this correction.
        enough_for_half: how many of what `over` names would resolve half of that; infinite where
            more seeds cannot, for the episodes are too few.
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
    p_wilcoxon_holm: float
    p_permutation: float
    p_permutation_holm: float
    resolvable: float
    enough_for_half: float
    time_ratio: float
    time_low: float
    time_high: float
    memory_ratio: float
    unlike: str

    def sentence(self, *, device: bool = False) -> str:
        """What the row says, to someone who has to choose; the better one is named first.

        Args:
            device: say it, for there are several.
        """
        shape = f"{self.ways}-way {self.shots}" if self.metric == "accuracy" else f"{self.shots}"
        where = f"on {self.dataset} {shape}-shot" + (f" on {self.device}" if device else "")
        turned = self.better == self.algorithm_b
        first, second = self.algorithm_a, self.algorithm_b
        if turned:
            first, second = second, first
        who = f"{first} over {second}" if self.better else f"{first} against {second}"
        parts = [f"{who} {where}: {self._difference(turned)}", f"{said_p(self.p_holm)} after Holm"]
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
            digits = decimals(self.metric, (self.high - self.low) / 2)
            mean, low, high = (100 * value for value in values)
            return f"{mean:+.{digits}f} points [{low:.{digits}f}, {high:.{digits}f}] {over}"
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
            low, high = map(_times, time[1:])
            interval = "" if math.isnan(time[1]) else f" [{low}, {high}]"
            said.append(f"{_times(time[0])}x the time{interval}")
        if not math.isnan(memory):
            said.append(f"{_times(memory)}x the memory")
        return said or ["costs not measured in turns"]

    def _resolution(self) -> str:
        if self.resolvable == 0:
            return "they score alike throughout"
        scale, unit = (100.0, " points") if self.metric == "accuracy" else (1.0, "")
        now, half = scale * self.resolvable, scale * self.resolvable / 2
        can = f"{getattr(self, self.over):,} {self.over} can resolve {now:.2g}{unit}"
        if math.isinf(self.enough_for_half):
            return f"{can} on {self.episodes:,} episodes, and without more of them not half of it"
        return f"{can}; {self.enough_for_half:,.0f} would resolve {half:.2g}"


def _times(ratio: float) -> str:
    """To three digits, or two below 1, of which none is lost to a ratio's being small."""
    if ratio >= 999.5:
        return f"{ratio:,.0f}"
    return f"{ratio:#.{3 if ratio >= 1 else 2}g}".rstrip(".")


COLUMNS = tuple(field.name for field in fields(Row))


@dataclass(frozen=True)
class Comparison:
    """What runs show.

    Attributes:
        rows: one a pair.
        ranks, aggregate: what there is to say of all settings together.
        left_out: pairs that are not compared, and why.
        notes: what else a reader must know.
    """

    rows: list[Row]
    ranks: Ranks | None
    aggregate: Aggregate | None
    left_out: list[str]
    notes: list[str]

    @property
    def table(self) -> pd.DataFrame:
        """The rows, with the columns :data:`COLUMNS`."""
        return pd.DataFrame([asdict(row) for row in self.rows], columns=list(COLUMNS))

    def lines(self) -> list[str]:
        """The comparison for a terminal."""
        heading = (
            f"{counted(len(self.rows), 'comparison')} on shared test episodes; p is corrected over "
            "all of them. Intervals are 95%, each for itself: over episodes they speak of these "
            "trained models on new tasks, over seeds of the algorithms trained again. Time and "
            "memory are a meta-step's."
        )
        several = len({row.device for row in self.rows}) > 1
        sentences = [row.sentence(device=several) for row in self.rows]
        return [heading, *sentences, *self.overall, *self.left_out, *self.notes]

    @property
    def overall(self) -> list[str]:
        """What is said of all settings together."""
        ranks = [self.ranks.sentence()] if self.ranks else []
        return ranks + (self.aggregate.sentences() if self.aggregate else [])

    def write(self, folder: Path) -> list[Path]:
        """Write ``comparison.csv``, and, where there are enough settings, ``aggregate.csv`` and
        the critical-difference diagram.

        Raises:
            BenchError: a folder that cannot be written.
        """
        run = Run(folder)
        tables = {folder / "comparison.csv": self.table}
        if self.aggregate is not None:
            tables[folder / "aggregate.csv"] = self.aggregate.table
        try:
            for path, table in tables.items():
                write_text(path, table.to_csv(index=False))
            if self.ranks is None:
                return list(tables)
            return [*tables, *save(self.ranks.diagram(), run.figures / "critical_difference")]
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
    lost: list[Cell] = []
    notes: list[str] = []
    for folder in folders:
        found, damaged = read(folder)
        results += found
        lost += Run(folder).lost()
        notes += [*damage_notes(folder, damaged), *left_out_notes(folder, found)]
    return compared(results, lost, notes, accept_changed_code)


def compared(
    results: Sequence[Result],
    lost: Sequence[Cell] = (),
    notes: Sequence[str] = (),
    accept_changed_code: bool = False,
) -> Comparison:
    """Every pair of entrants among results that met the same test episodes.

    Args:
        results: of complete cells.
        lost: cells that came to nothing, from which the others are told apart too.
        notes: what a reader must know besides.
        accept_changed_code: compare cells that different source made.

    Raises:
        BenchError: results of different source, or nothing to compare.
    """
    notes = list(notes)
    sources = sorted({result.record.source for result in results})
    if len(sources) > 1 and not accept_changed_code:
        raise BenchError(
            f"the cells were made by different source code ({', '.join(sources)}); "
            "--accept-changed-code compares them all the same"
        )
    if len(sources) > 1:
        notes.append(f"these cells were made by different source code: {', '.join(sources)}")
    field = entrants(results)
    names, _ = labels(field, lost)
    notes += _twice(results, field, names)
    results = [result for entrant in field for result in entrant.by_seed.values()]
    pairs, left_out = _pair_up(field, names)
    if not pairs:
        why = left_out[0] if left_out else f"all cells are of {field[0].algorithm}, set up alike"
        raise BenchError(f"there is nothing to compare: {why}")
    own = TUNED - set(varied(entrant.row for entrant in field))
    rows = [_row(a, b, names, own, ALPHA / len(pairs)) for a, b in pairs]
    notes += [*_doubts(results), *_reuse(results)]
    device = main_device(field)
    mine = [entrant for entrant in field if entrant.any.cell.device == device]
    settings = blocks(mine, names)
    if len(mine) < len(field) and len(settings) > 1:
        notes.append(f"what is said of all settings is of the cells on {device}")
    return Comparison(_corrected(rows), rank(settings), aggregate(settings), left_out, notes)


def _pair_up(
    field: Sequence[Entrant], names: dict[Entrant, str]
) -> tuple[list[tuple[Entrant, Entrant]], list[str]]:
    """The pairs that can be compared, and why others, at the same place, cannot."""
    pairs = []
    obstacles: dict[str, list[str]] = {}
    for a, b in _neighbours(field):
        obstacle = _obstacle(a, b)
        if obstacle is None:
            pairs.append((a, b))
        else:
            dataset, ways, shots = a.place
            key = f"on {dataset} {ways}-way {shots}-shot, {obstacle}"
            obstacles.setdefault(key, []).append(f"{names[a]} and {names[b]}")
    return pairs, [f"left out: {_some(who)} {why}" for why, who in obstacles.items()]


def _some(who: Sequence[str]) -> str:
    """The first of many pairs, and how many more there are."""
    more = [f"{len(who) - MOST_LEFT_OUT:,} more pairs"] if len(who) > MOST_LEFT_OUT else []
    return "; ".join([*who[:MOST_LEFT_OUT], *more])


def _neighbours(field: Sequence[Entrant]) -> Iterator[tuple[Entrant, Entrant]]:
    """Every two entrants at one place, in the order of the field."""
    later: dict[tuple[str, int, int], deque[Entrant]] = {}
    for entrant in field:
        later.setdefault(entrant.place, deque()).append(entrant)
    for a in field:
        later[a.place].popleft()
        yield from ((a, b) for b in later[a.place])


def _obstacle(a: Entrant, b: Entrant) -> str | None:
    """What keeps two entrants from being paired, episode by episode."""
    x, y = a.any, b.any
    if x.episodes != y.episodes:
        met = [f"{count} of {address}" for address, count in (x.episodes, y.episodes)]
        return f"which met other test episodes: {met[0]}, against {met[1]}"
    if of_other_data(x, y):
        return "which were tested on other data of the same name"
    if x.cell.device != y.cell.device:
        return f"which ran on {x.cell.device} and {y.cell.device}"
    if not a.by_seed.keys() & b.by_seed.keys():
        return f"which have no seed in common: {sorted(a.by_seed)}, against {sorted(b.by_seed)}"
    return None


def _row(a: Entrant, b: Entrant, names: dict[Entrant, str], own: Set[str], alpha: float) -> Row:
    """Entrant a against b; ``own`` are settings that may differ without a word."""
    seeds = sorted(a.by_seed.keys() & b.by_seed.keys())
    x, y = (np.stack([one.by_seed[seed].scores for seed in seeds]) for one in (a, b))
    d = x - y
    found: Difference
    if len(seeds) == 1:
        found, d = paired_difference(x[0], y[0]), d[0]
    else:
        found = hierarchical_difference(x, y)
    least, fewest = RESOLUTION[found.interval.over]
    resolvable = least(d, alpha=alpha)
    needed = fewest(d, resolvable / 2, alpha=alpha) if resolvable else math.nan
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
        p_wilcoxon_holm=math.nan,
        p_permutation=paired.p_permutation if paired else math.nan,
        p_permutation_holm=math.nan,
        resolvable=resolvable,
        enough_for_half=needed,
        **_cost_ratios([(a.by_seed[seed], b.by_seed[seed]) for seed in seeds]),
        unlike=", ".join(f"{n} {said(x)} / {said(y)}" for n, (x, y) in unlike.items()),
    )


def _cost_ratios(pairs: Sequence[tuple[Result, Result]]) -> dict[str, float]:
    """Time and memory of a meta-step, a over b: repeats of one session, which took turns."""
    both = [(a.steps[key], b.steps[key]) for a, b in pairs for key in a.steps if key in b.steps]
    seconds, peaks = np.array(both).reshape(-1, 2, 2).transpose(2, 1, 0)
    ratios = dict.fromkeys(("time_ratio", "time_low", "time_high", "memory_ratio"), math.nan)
    if seconds.size:
        time = paired_ratio(*seconds)
        ratios |= {"time_ratio": time.estimate, "time_low": time.low, "time_high": time.high}
    peaks = peaks[:, (peaks > 0).all(axis=0)]  # what was not measured is not a number
    if peaks.size:
        ratios["memory_ratio"] = paired_ratio(*peaks).estimate
    return ratios


def _corrected(rows: Sequence[Row]) -> list[Row]:
    """The rows with Holm's correction of each test over all of them, and who is better by it."""
    corrected = list(rows)
    for test in TESTS:
        values: dict[int, float] = {i: getattr(row, test) for i, row in enumerate(rows)}
        known = {i: p for i, p in values.items() if not math.isnan(p)}
        adjusted = holm(list(known.values())).tolist() if known else []
        for i, p in zip(known, adjusted, strict=True):
            found: dict[str, Any] = {f"{test}_holm": p}
            corrected[i] = replace(corrected[i], **found)
    return [replace(row, better=_better(row)) for row in corrected]


def _better(row: Row) -> str:
    if not row.p_holm < ALPHA:
        return ""
    a_leads = (row.difference > 0) == (row.metric == "accuracy")
    return row.algorithm_a if a_leads else row.algorithm_b


def _twice(
    results: Iterable[Result], field: Sequence[Entrant], names: dict[Entrant, str]
) -> list[str]:
    """Seeds of entrants that are there again, with other scores: which run is named first decides
    what is compared."""
    kept = {
        (*result.likeness, result.cell.seed): (entrant, result)
        for entrant in field
        for result in entrant.by_seed.values()
    }
    found = []
    for result in results:
        entrant, first = kept[(*result.likeness, result.cell.seed)]
        if not np.array_equal(first.scores, result.scores):
            dataset, ways, shots = entrant.place
            found.append(
                f"{names[entrant]} on {dataset} {ways}-way {shots}-shot seed {result.cell.seed} is "
                "there again with other scores; the run that is named first is compared"
            )
    return found


def _doubts(results: Sequence[Result]) -> list[str]:
    """Cells whose accuracies vary less than coin tosses would."""
    names = cell_names(result.cell for result in results)
    return [
        f"doubtful: {names[result.cell.id]} varies less from episode to episode than chance allows"
        for result in results
        if result.metric == "accuracy"
        and below_floor(mean_interval(result.scores), result.cell.ways * result.cell.test_shots)
    ]


def _reuse(results: Sequence[Result]) -> list[str]:
    rows = pd.DataFrame([result.record.row() for result in results])
    return reuse_notes(rows) if "sample_reuse" in rows else []


# Many settings at once


def main_device(field: Sequence[Entrant]) -> str:
    """That of most entrants. What is said of all settings is of its cells: a setting that was run
    on two devices is still one."""
    counts = Counter(entrant.any.cell.device for entrant in field)
    return max(sorted(counts), key=lambda device: counts[device])


def blocks(field: Sequence[Entrant], names: dict[Entrant, str]) -> list[Block]:
    """The scores of each setting: a place, and the test episodes that were met there."""
    members: dict[tuple[Any, ...], dict[str, Entrant]] = {}
    for entrant in field:
        key = (entrant.place, entrant.any.episodes, entrant.any.data["test_data"])
        members.setdefault(key, {}).setdefault(names[entrant], entrant)
    return [_block(block) for block in members.values()]


def _block(members: dict[str, Entrant]) -> Block:
    first, *others = members.values()
    sign = 1 if first.any.higher_is_better else -1
    return Block(
        scores={
            name: {seed: sign * float(one.scores.mean()) for seed, one in entrant.by_seed.items()}
            for name, entrant in members.items()
        },
        accuracy=first.any.higher_is_better,
        unlike=frozenset(n for other in others for n in differing(first, other))
        - TUNED
        - {*COUNTS},
    )
