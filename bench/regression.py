"""Did a change break anything: a run held against a baseline, cell by cell.

Accuracy is judged on the test episodes that both met, by a test that a loss of the margin is ruled
out. Time and memory are judged by repeats; a time is first divided by that of the calibration
workload of the same repeat, so that a baseline made on another machine still serves.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.markup import escape
from rich.table import Table
from scipy import stats as distributions

from bench.errors import BenchError
from bench.measure import CALIBRATION, EVALUATION, STEP
from bench.naming import told_apart
from bench.paper import md
from bench.results import Entrant, Result, damage_notes, differing, of_other_data, read
from bench.stats import Floats, Interval, episodes_to_resolve, non_inferiority
from bench.store import Run, outcome
from bench.sweep import Cell

Verdict = Literal["ok", "worse", "not ruled out", "too noisy"]
ALARMS: tuple[Verdict, Verdict] = ("worse", "not ruled out")
RESIDENT_SLACK_BYTES = 32 * 2**20
"""Growth of a CPU process's peak that is no alarm: the memory allocator's own ups and downs."""
PHASES = {STEP: "meta-step", EVALUATION: "evaluation"}
CPU_CLOCK, MEMORY = "process_seconds", "peak_bytes"
COSTS = {"seconds": "wall time", CPU_CLOCK: "CPU time", MEMORY: "memory"}


@dataclass(frozen=True)
class Finding:
    """One quantity of one setting, now against the baseline.

    Attributes:
        setting: algorithm, dataset, ways and shots.
        quantity: what was compared, such as ``accuracy`` or ``meta-step CPU time``.
        change, low, high: now - baseline with its interval, in `unit`.
        limit: the change that is tolerated, in the same unit.
        verdict: ``worse`` and ``not ruled out`` are alarms; ``too noisy`` is beyond the limit by
            no more than noise.
        remark: what would settle it, where that is known.
    """

    setting: str
    quantity: str
    change: float
    low: float
    high: float
    unit: Literal["points", "%"]
    limit: float
    verdict: Verdict
    remark: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """The finding as a row of a table."""
        interval = f"[{self.low:+.1f}, {self.high:+.1f}]"
        return (
            self.setting,
            self.quantity,
            f"{self.change:+.1f} {self.unit}",
            interval,
            f"{self.limit:+g} {self.unit}",
            f"{self.verdict}: {self.remark}" if self.remark else self.verdict,
        )

    @property
    def used(self) -> float:
        """How much of what is tolerated the change takes up: above 1 it is beyond the limit."""
        return self.change / self.limit


HEADING = ("setting", "what", "change", "interval", "limit", "verdict")


@dataclass(frozen=True)
class Check:
    """What a run shows against a baseline.

    Attributes:
        findings: everything that was compared.
        failed: cells of the baseline that failed now, which is a regression too.
        missing: how many cells of the baseline are not there at all.
        may_miss: whether that is to be expected; else it is a regression too, for nobody knows
            what they would have shown.
        notes: cells without a counterpart, changed settings, and the like.
        rule: when there is an alarm, in words.
    """

    findings: list[Finding]
    failed: list[str]
    missing: int
    may_miss: bool
    notes: list[str]
    rule: str

    @property
    def regressed(self) -> bool:
        """Whether anything is an alarm."""
        return bool(self.worse or self.failed or (self.missing and not self.may_miss))

    @property
    def worse(self) -> list[Finding]:
        """The findings that are alarms, the largest first."""
        alarms = [finding for finding in self.findings if finding.verdict in ALARMS]
        return sorted(alarms, key=lambda finding: -finding.used)

    @property
    def conclusion(self) -> str:
        """The outcome in one line."""
        count, missing = len(self.findings), []
        if self.missing:
            missing = [f"cells of the baseline that are not here: {self.missing}"]
        if self.regressed:
            counts = Counter(finding.verdict for finding in self.worse)
            said = ("got worse", "may have (a loss is not ruled out)")
            alarms = [
                f"{counts[v]} {how}" for v, how in zip(ALARMS, said, strict=True) if counts[v]
            ]
            failed = [f"failed: {', '.join(self.failed)}"] if self.failed else []
            parts = [f"of {count} checks {', '.join(alarms)}"] if alarms else []
            return f"regression: {'; '.join([*parts, *failed, *missing])}"
        noisy = sum(finding.verdict == "too noisy" for finding in self.findings)
        doubt = [f"{noisy} were too noisy to tell"] if noisy else []
        return "; ".join([f"no regression in {count} checks", *doubt, *missing])

    @property
    def nearest(self) -> list[Finding]:
        """Of each quantity the finding that comes nearest to its limit, or is furthest beyond."""
        quantities = dict.fromkeys(finding.quantity for finding in self.findings)
        return [
            max((f for f in self.findings if f.quantity == quantity), key=lambda f: f.used)
            for quantity in quantities
        ]

    def table(self) -> Table:
        """For a terminal: what got worse; if nothing did, what came nearest to it."""
        title = "what raised the alarm" if self.worse else "what came nearest to its limit"
        table = Table(*HEADING, title=title, title_justify="left")
        for finding in self.worse or self.nearest:
            table.add_row(*map(escape, finding.cells))
        return table

    def markdown(self) -> str:
        """For a job summary of GitHub Actions."""
        mark = ":x:" if self.regressed else ":white_check_mark:"
        parts = [f"### {mark} {md(self.conclusion)}"]
        if self.worse:
            parts.append(_markdown_table(self.worse))
        notes = "\n".join(f"- {md(note)}" for note in [*self.notes, self.rule])
        everything = _markdown_table(self.findings)
        parts += [notes, f"<details><summary>All checks</summary>\n\n{everything}\n\n</details>"]
        return "\n\n".join(parts) + "\n"


def _markdown_table(findings: Iterable[Finding]) -> str:
    cells = ((md(finding.setting), *finding.cells[1:]) for finding in findings)
    rows = [HEADING, ("---",) * len(HEADING), *cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def check(
    folder: Path,
    baseline: Path,
    margin: float = 1.0,
    slowdown: float = 15.0,
    allow_missing: bool = False,
) -> Check:
    """Hold a run against a baseline.

    Args:
        folder, baseline: the two runs.
        margin: loss that is to be ruled out: points of accuracy; of an error, per cent of the
            baseline's.
        slowdown: growth of time or memory that is tolerated, in per cent.
        allow_missing: whether the run may lack cells of the baseline.

    Raises:
        BenchError: a limit that is not positive, a run without results, or two runs that share no
            cell.
    """
    for name, value in (("margin", margin), ("slowdown", slowdown)):
        if not (value > 0 and math.isfinite(value)):
            raise BenchError(f"{name}: {value:g} is not a positive number")
    failures = Run(folder).failures()
    now, damaged = read(folder, none_will_do=bool(failures))
    before, damaged_before = read(baseline)
    pairs, alone = match(now, before)
    failed = _failed(now, before, failures)
    if not pairs and not failed:
        raise BenchError(
            f"no cell of {folder} has a counterpart in {baseline}: the same algorithm, dataset, "
            "ways, shots, seed, device and test episodes, of the same data"
        )
    notes = damage_notes(folder, damaged) + damage_notes(baseline, damaged_before)
    findings: list[Finding] = []
    notes += [f"in {folder} alone: {name}" for name in alone[0]]
    notes += [f"in {baseline} alone: {name}" for name in alone[1]]
    for setting, group in _by_setting(pairs).items():
        notes += _changed_settings(setting, group)
        costs = _costs(setting, group, slowdown)
        findings += [_score(setting, group, margin), *costs]
        if not costs:
            notes.append(f"{setting}: costs were not measured in both runs")
    rule = (
        f"Alarms: accuracy where a loss of {margin:g} points (an error: {margin:g}%) is not ruled "
        "out by a paired one-sided t test at 5% on the shared episodes (intervals: 90%, over "
        "episodes: they speak of these trained models, and other roundings alone train others); "
        f"time and memory where growth is above {slowdown:g}% and the 95% interval, "
        "which allows runs to differ by as much as repeats do, is above 0."
    )
    missing = max(len(alone[1]) - len(failed), 0)
    return Check(findings, failed, missing, allow_missing, notes, rule)


# Which cells belong together


def match(
    now: Sequence[Result], before: Sequence[Result]
) -> tuple[list[tuple[Result, Result]], tuple[list[str], list[str]]]:
    """Pairs of cells (now, baseline), and the names of those left alone in either.

    Cells belong together that ran the same algorithm with the same seed on the same test episodes
    and device, whatever their other settings: a changed default is among what is checked. Where
    several do in one run, their settings must be equal too. Data that are known to be other ones
    keep them apart.
    """
    places: dict[tuple[Any, ...], tuple[list[Result], list[Result]]] = {}
    for side, results in enumerate((now, before)):
        for result in results:
            places.setdefault(_place_of(result), ([], []))[side].append(result)
    pairs: list[tuple[Result, Result]] = []
    for mine, theirs in places.values():
        if len(mine) == len(theirs) == 1:
            pairs.append((mine[0], theirs[0]))
            continue
        counterpart = {result.cell.id: result for result in theirs}
        pairs += [(one, counterpart[one.cell.id]) for one in mine if one.cell.id in counterpart]
    pairs = [pair for pair in pairs if not of_other_data(*pair)]
    paired = {result for pair in pairs for result in pair}
    mine_alone, theirs_alone = (
        [_described(result) for result in results if result not in paired]
        for results in (now, before)
    )
    return pairs, (mine_alone, theirs_alone)


def _failed(
    now: Sequence[Result], before: Sequence[Result], failures: Mapping[str, dict[str, Any]]
) -> list[str]:
    """Cells of the baseline that failed now, each with what became of it: as it was set up then or,
    as in :func:`match`, the one cell of its place whatever its other settings."""
    at: dict[tuple[Any, ...], dict[str, Any]] = {}
    for failure in failures.values():
        cell = Cell(**failure["settings"])
        at.setdefault(_place(cell, (cell.test_spec.address, cell.episodes)), failure)
    there, baseline = (Counter(map(_place_of, results)) for results in (now, before))
    found = []
    for result in before:
        failed, place = failures.get(result.cell.id), _place_of(result)
        if failed is None and baseline[place] == 1 and not there[place]:
            failed = at.get(place)
        if failed is not None:
            found.append(f"{result.cell} ({outcome(failed)['status']})")
    return found


def _place_of(result: Result) -> tuple[Any, ...]:
    return _place(result.cell, result.episodes)


def _place(cell: Cell, episodes: tuple[str, int]) -> tuple[Any, ...]:
    return (cell.algorithm, cell.seed, cell.device, episodes)


def _described(result: Result) -> str:
    address, count = result.episodes
    data = result.data["test_data"]
    return f"{result.cell}, {count} episodes of {address}" + (f", data {data}" if data else "")


def _by_setting(
    pairs: Iterable[tuple[Result, Result]],
) -> dict[str, list[tuple[Result, Result]]]:
    """The pairs that differ in nothing but the seed, under a name for people."""
    groups: dict[tuple[str, ...], list[tuple[Result, Result]]] = {}
    for pair in pairs:
        key = tuple(result.cell.seedless_id for result in pair)
        groups.setdefault(key, []).append(pair)
    named: dict[str, list[tuple[Result, Result]]] = {}
    owns = told_apart([group[0][0].cell.row() for group in groups.values()])
    for ((cell_id, _), group), own in zip(groups.items(), owns, strict=True):
        cell = group[0][0].cell
        name = f"{cell.algorithm} on {cell.dataset} {cell.ways}-way {cell.shots}-shot"
        name = f"{name} ({own})" if own else name
        named[f"{name} ({cell_id})" if name in named else name] = group
    return named


def _changed_settings(setting: str, group: Sequence[tuple[Result, Result]]) -> list[str]:
    now, before = (Entrant({result.cell.seed: result}) for result in group[0])
    changed = {name: both for name, both in differing(now, before).items() if name != "source"}
    if not changed:
        return []
    said = ", ".join(f"{name} {old} -> {new}" for name, (new, old) in changed.items())
    return [f"{setting}: settings changed: {said}"]


# Scores


def _score(setting: str, group: Sequence[tuple[Result, Result]], margin: float) -> Finding:
    """Is a loss of `margin` ruled out? The seeds' differences are averaged in each episode."""
    now, before = (np.mean([pair[side].scores for pair in group], axis=0) for side in (0, 1))
    metric = group[0][0].metric
    gain, limit = now - before, -margin
    if metric != "accuracy":  # an error: lower is better, and its scale is the baseline's
        gain = (before - now) / before.mean()
    test = non_inferiority(gain, margin / 100)
    found = test.interval
    change, low, high = 100 * found.estimate, 100 * found.low, 100 * found.high
    verdict: Verdict = "ok" if test.passed else "worse" if high < 0 else "not ruled out"
    remark = _episodes_needed(gain, margin / 100) if verdict == "not ruled out" else ""
    if metric == "accuracy":
        return Finding(setting, metric, change, low, high, "points", limit, verdict, remark)
    return Finding(setting, metric, -change, -high, -low, "%", margin, verdict, remark)


def _episodes_needed(gain: Floats, margin: float) -> str:
    """How many episodes would have shown, with 80% power, that an unchanged model is no worse."""
    needed = episodes_to_resolve(gain, margin, alpha=0.1)  # one-sided at 5%
    return f"{needed:,} episodes would tell, {len(gain):,} do not" if needed > len(gain) else ""


# Costs


def _costs(setting: str, group: Sequence[tuple[Result, Result]], slowdown: float) -> list[Finding]:
    """Time by each clock, and memory, of each phase that both measured."""
    on_cpu = group[0][0].cell.device == "cpu"
    findings = []
    for phase, phase_name in PHASES.items():
        for column, name in COSTS.items():
            if column == CPU_CLOCK and not on_cpu:
                continue  # an accelerator's work takes no CPU time
            logs = [[_log_cost(one, phase, column) for one in pair] for pair in group]
            sessions = [(x, y) for x, y in logs if min(len(x), len(y)) > 1]
            if not sessions:
                continue
            slack = RESIDENT_SLACK_BYTES if on_cpu and column == MEMORY else 0
            verdict, ratio = _judged(sessions, slowdown, slack)
            change, low, high = (
                100 * (value - 1) for value in (ratio.estimate, ratio.low, ratio.high)
            )
            quantity = f"{phase_name} {name}"
            findings.append(Finding(setting, quantity, change, low, high, "%", slowdown, verdict))
    return findings


def _log_cost(result: Result, phase: str, column: str) -> Floats:
    """Logarithms of a cost, one a repeat; a time is divided by that of the same repeat's
    calibration. Empty where it was not measured."""
    found = result.repeats(phase, column)
    units = dict.fromkeys(found, 1.0) if column == MEMORY else result.repeats(CALIBRATION, column)
    cost = np.array([value / units.get(repeat, math.nan) for repeat, value in found.items()])
    logs: Floats = np.log(cost[cost > 0])
    return logs


def _judged(
    sessions: Sequence[tuple[Floats, Floats]], slowdown: float, slack: float
) -> tuple[Verdict, Interval]:
    ratio = growth(sessions)
    now, before = (np.mean([np.median(pair[side]) for pair in sessions]) for side in (0, 1))
    tolerated = ratio.estimate <= 1 + slowdown / 100 or math.exp(now) - math.exp(before) <= slack
    return "ok" if tolerated else "worse" if ratio.low > 1 else "too noisy", ratio


def growth(sessions: Sequence[tuple[Floats, Floats]], confidence: float = 0.95) -> Interval:
    """How many times as much a cost is as it was, from logarithms of repeats (now, before).

    A session is one process, measured at one time. The two of a pair were not measured side by
    side, so their repeats are independent samples, and the estimate is the median of all their
    differences (Hodges and Lehmann 1963), which stray repeats do not move, averaged over sessions.

    Repeats within a session do not show how much sessions differ, by the machine's load and a
    process's layout in memory. On a busy machine that is about as much as repeats differ, and so
    the variance of a session is taken to be that of a repeat: with n repeats in S sessions, those
    of one side add s^2 (1 + 1/n) / S. More seeds, each a session of its own, narrow the interval.
    """
    shifts = [np.median(np.subtract.outer(now, before)) for now, before in sessions]
    samples = [sample for pair in sessions for sample in pair]
    variance = sum(x.var(ddof=1) * (1 + 1 / x.size) for x in samples) / len(sessions) ** 2
    freedom = sum(x.size - 1 for x in samples)
    half = float(distributions.t.ppf((1 + confidence) / 2, freedom)) * math.sqrt(variance)
    shift = float(np.mean(shifts))
    low, estimate, high = (math.exp(shift + step) for step in (-half, 0.0, half))
    return Interval(estimate, low, high, len(sessions), "repeats", confidence)
