"""A run as a page to look at, a comment for a pull request, a table for a paper, and figures.

    cells on disk -> tables, comparison -> what is shown of them -> report.html

``report.html`` is one file that asks the network for nothing. Its content security policy lets only
the two scripts in it run, by their hashes, and whatever comes from data is text to it, not markup.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from bench import findings, paper, plots, tables
from bench.comparison import Comparison, Row, compared
from bench.environment import makers
from bench.errors import BenchError
from bench.failures import lost, scoreless
from bench.files import write_text
from bench.findings import Task
from bench.measure import GROWTH_TASKS
from bench.naming import SETTING
from bench.reading import read_json
from bench.store import Run
from bench.sweep import Cell, Sweep
from bench.tables import COSTS, FAIRNESS, Tables
from bench.wording import decimals, digits_of, plain

MOST_PAIRED = 25
"""Entries of a task, best first, whose differences the page shows: those of a hundred are five
thousand, more than anyone reads, and comparison.csv has them all."""

HALF_WIDTHS = ("ci_seeds", "ci_episodes", "ci95_classes")
"""Of an entry's intervals, as the leaderboard shows them."""

AXES = ("algos", "datasets", "ways", "shots", "seeds", "devices")

MEASURED = {
    "step_ms": ("Meta-step, ms", 1, 1),
    "eval_ms_per_episode": ("Episode, ms", 1, 1),
    "peak_memory_bytes": ("Memory, MiB", 2**20, 0),
    "step_gflops": ("GFLOP a step", 1, 4),
    "episode_gflops": ("GFLOP an episode", 1, 4),
    "matmul_share": ("Of the matrix-product rate, %", 0.01, 1),
    "step_joules": ("Energy of a step, J", 1, 3),
    "train_seconds": ("Training, s", 1, 1),
    "samples_per_step": ("Samples a step", 1, 0),
    "gradients_per_step": ("Gradients a step", 1, 0),
}
"""What the leaderboard shows of an entry's costs, where any was measured: head, unit, digits after
the point."""

NOTHING = pd.Series(dtype=float)

CHARTS: list[dict[str, Any]] = [
    {
        "id": "scores",
        "title": "Score",
        "says": "After the last inner step. Grey bar: 95% interval over episodes (these trained "
        "models, new tasks); thin whisker: over seeds (the algorithm, trained again, "
        "on these test episodes).",
    },
    {
        "id": "sensitivity",
        "title": "Sensitivity",
        "says": "Score over the values of a setting that was swept, all else being equal. Bars: "
        "95% intervals, over seeds where there are two or more, else over episodes.",
        "controls": [{"id": "sensitivity-axis", "title": "Setting", "options": []}],
    },
    {
        "id": "adaptation",
        "title": "Adaptation",
        "says": "Score after each inner step on the support set. Band: 95% interval over "
        "episodes (these trained models, new tasks).",
    },
    {
        "id": "learning",
        "title": "Learning",
        "says": "Score during meta-training, mean of the seeds. Band: lowest to highest seed. "
        "Validation episodes are the same for all; training scores are each algorithm's own.",
        "controls": [
            {
                "id": "learning-of",
                "title": "Score on",
                "options": [("validation", "validation episodes"), ("training", "training tasks")],
            },
            {
                "id": "learning-x",
                "title": "Against",
                "options": [("iteration", "iterations"), ("seconds", "seconds")],
            },
        ],
    },
    {
        "id": "growth",
        "title": "Memory over inner steps",
        "says": f"Peak of a meta-step on {GROWTH_TASKS} tasks (fewer where the meta-batch has "
        "fewer), mean of the seeds. Band: lowest to highest seed.",
    },
    {
        "id": "cost",
        "title": "Score against cost",
        "says": "Filled and joined: the Pareto front, where no other entry scores better for less. "
        "Costs are medians over seeds.",
        "controls": [
            {
                "id": "cost-x",
                "title": "Cost",
                "options": [(name, title) for name, (title, _) in COSTS.items()],
            }
        ],
    },
]


def write(folder: Path) -> list[Path]:
    """Write a run's report into its folder, each file whole or not at all.

    Returns:
        What was written, the page first.

    Raises:
        BenchError: there is no run in the folder, or it cannot be written.
    """
    run = Run(folder)
    found = tables.read(run)
    comparison = compared_pairs(found, run.lost())
    said = [*comparison.overall, *comparison.left_out, *comparison.notes]
    command = reproduction(found.sweep) if found.sweep else ""
    name = folder.resolve().name
    documents = {
        "report.html": page(folder, found, comparison),
        "report.md": paper.markdown(name, found, comparison.rows, said, command),
        "table.tex": paper.latex(found, comparison.rows),
    }
    try:
        for file, text in documents.items():
            write_text(folder / file, text)
        written = [folder / file for file in documents]
        if comparison.rows:
            written += comparison.write(folder)
        return written + plots.draw_tables(found, run.figures)
    except OSError as error:
        raise BenchError(f"cannot write to {folder}: {error.strerror}") from error


def compared_pairs(found: Tables, lost: Sequence[Cell]) -> Comparison:
    """The run's comparison; where no pair can be, it says why."""
    why = "no cell is complete"
    if found.results:
        try:
            return compared(found.results, lost, accept_changed_code=True)
        except BenchError as error:
            why = str(error)
    return Comparison([], None, None, [f"No pairs: {why}."], [])


def reproduction(sweep: Sweep) -> str:
    """The options that ask for what a sweep asks for."""
    words = ["python", "-m", "bench", "run"]
    asked = sweep.model_dump(mode="json", exclude_none=True)
    swept = asked.pop("set")
    for name, value in asked.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value is not False:
            words += [option, _list(value) if name in AXES else str(value)]
    for name, values in swept.items():
        words += ["--set", f"{name}={_list(values)}"]
    return shlex.join(words)


def _list(values: Sequence[Any]) -> str:
    return ",".join(map(str, values))


# The page


def page(folder: Path, found: Tables, comparison: Comparison) -> str:
    """A run as one HTML file."""
    rows, ranks = comparison.rows, comparison.ranks
    tasks = findings.tasks(found.leaderboard)
    style, script = _text("report.css"), _text("report.js")
    sweep = found.sweep
    template = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    ).from_string(_text("report.html.j2"))
    return template.render(
        name=folder.resolve().name,
        policy=_policy(script, _plotly()),
        style=Markup(style),
        script=Markup(script),
        plotly=Markup(_packed_plotly()),
        data=_json(_chart_data(found, tasks)),
        counts=_counts(found, tasks),
        verdicts=[findings.verdict(task, rows) for task in tasks],
        **_leaderboard(found, tasks),
        notes=comparison.notes,
        tasks=tasks,
        charts=_charts(found),
        matrices=[_matrix(task, mine) for task in tasks if (mine := findings.pairs(task, rows))],
        overall=comparison.overall,
        ranks=_picture(ranks.diagram()) if ranks else "",
        comparison_note=" ".join(comparison.left_out),
        faults=found.faults.to_dict("records"),
        fault_counts=_fault_counts(found.faults),
        command=reproduction(sweep) if sweep else "",
        code=shlex.join(["--plugin", str(sweep.plugin)]) if sweep and sweep.plugin else "",
        asked=(folder / "sweep.toml").read_text(encoding="utf-8") if sweep else "",
        made=makers(result.record.figures for result in found.results),
        environment=_environment(folder / "environment.json"),
        settings=_settings(found.leaderboard),
    )


def _text(name: str) -> str:
    return resources.files("bench").joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs  # half a second that other commands need not wait

    return str(get_plotlyjs())


@cache
def _packed_plotly() -> str:
    """Plotly's script, gzipped: 2 MB of the page instead of 5."""
    return base64.b64encode(gzip.compress(_plotly().encode(), mtime=0)).decode()


def _policy(*scripts: str) -> str:
    """Nothing from anywhere, and these scripts; Plotly styles what it draws in place."""
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _json(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028"))


def _counts(found: Tables, tasks: Sequence[Task]) -> str:
    board = found.leaderboard
    algorithms, cells = board["algorithm"].nunique(), int(board["seeds"].sum())
    return (
        f"{_plural(algorithms, 'algorithm')} on {_plural(len(tasks), 'task')}, "
        f"{_plural(cells, 'complete cell')}."
    )


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _fault_counts(faults: pd.DataFrame) -> str:
    counts = faults["status"].value_counts()
    return ", ".join(f"{count} {status}" for status, count in counts.items())


# The leaderboard


@dataclass(frozen=True)
class Column:
    """A column of the leaderboard: its head, and whether its text is words or figures.

    Attributes:
        first: the order that the first press of its button gives.
    """

    title: str
    text: bool = False
    sorts: bool = True
    first: str = "ascending"


@dataclass(frozen=True)
class Shown:
    """A cell of the leaderboard: its text, what it sorts by, a class, and a bar's three places."""

    text: str
    sort: Any = ""
    kind: str = ""
    bar: tuple[float, float, float] | None = None


def _leaderboard(found: Tables, tasks: Sequence[Task]) -> dict[str, Any]:
    """The leaderboard as the page shows it."""
    board = found.leaderboard
    settings = tables.varying(board)
    differing = tables.unlike(board)
    metrics = board["metric"].dropna().unique()
    bounds = {task.setting: _bounds(task) for task in tasks}
    best_first = "ascending" if "accuracy" not in metrics else "descending"
    title = "Score" if len(metrics) != 1 else tasks[0].axis.capitalize()
    measured = {
        name: how for name, how in MEASURED.items() if board.get(name, NOTHING).notna().any()
    }
    columns = [
        Column("Algorithm", text=True),
        Column("Task", text=True),
        Column(title, first=best_first),
        Column("95% interval", text=True, sorts=False),
        Column("± over seeds"),
        Column("± over episodes"),
        Column("± over classes"),
        Column("Seeds"),
        *(Column(name.replace("_", " ").capitalize()) for name in settings),
        *(Column(title) for title, _, _ in measured.values()),
    ]
    rows = []
    for _, row in board.iterrows():
        setting = tuple(row[name] for name in SETTING)
        cells = [Shown(row["label"], row["label"]), _task_cell(row, board)]
        cells += _score_cells(row, len(metrics) > 1, bounds.get(setting))
        cells += [_setting_cell(row[n], n in differing.get(setting, ())) for n in settings]
        cells += [_cost(row, name) for name in measured]
        rows.append({"data": {name: row[name] for name in SETTING}, "cells": cells})
    return {
        "columns": columns,
        "rows": rows,
        "filters": _filters(board),
        "shared": _shared(board, settings),
        "any_differs": bool(differing),
    }


def _filters(board: pd.DataFrame) -> list[dict[str, Any]]:
    """A choice for each of the setting's parts that varies."""
    return [
        {"name": name, "title": name.capitalize(), "options": sorted(board[name].unique())}
        for name in SETTING
        if board[name].nunique() > 1
    ]


def _shared(board: pd.DataFrame, settings: Sequence[str]) -> str:
    """What is the same for all rows that have it."""
    alike = [name for name in (*SETTING, *FAIRNESS) if tables.values(board[name]) == 1]
    shown = []
    for name in (name for name in alike if name not in settings):
        some = " (of those that have any)" if board[name].isna().any() else ""
        shown.append(f"{name.replace('_', ' ')} {plain(board[name].dropna().iloc[0])}{some}")
    if "train_shots" not in (*settings, *alike):
        shown.append("train shots as shots")
    return ", ".join(shown)


def _bounds(task: Task) -> tuple[float, float]:
    """From where to where a task's bars go: its intervals, within what the metric can be."""
    low = float(np.nanmin(task.rows[["low", "mean"]].to_numpy(float)))
    high = float(np.nanmax(task.rows[["high", "mean"]].to_numpy(float)))
    return max(low, 0.0), min(high, 1.0) if task.metric == "accuracy" else high


def _task_cell(row: pd.Series[Any], board: pd.DataFrame) -> Shown:
    name = findings.task_name(row, board)
    return Shown(name, f"{row['dataset']} {row['ways']:05d} {row['shots']:05d}", "text")


def _setting_cell(value: Any, differs: bool) -> Shown:
    text = plain(value)
    return Shown(f"{text} ≠", text, "differs") if differs else Shown(text, text)


def _score_cells(
    row: pd.Series[Any], with_unit: bool, bounds: tuple[float, float] | None
) -> list[Shown]:
    """Score, bar, both half widths and the seeds."""
    less = f" ({lost(row)})" if row["failed"] else ""
    seeds = Shown(f"{row['seeds']}{less}", row["seeds"], "failed" if less else "")
    if bounds is None or row["seeds"] == 0:
        return [Shown(scoreless(row), "", "failed"), *[Shown("")] * 4, seeds]
    scale = 100 if row["metric"] == "accuracy" else 1
    digits = decimals(row["metric"], row["mean"], (row["high"] - row["low"]) / 2)
    unit = "" if not with_unit else " %" if row["metric"] == "accuracy" else " mse"
    mean = Shown(f"{scale * row['mean']:.{digits}f}{unit}", f"{scale * row['mean']:.6g}", "score")
    halves = [_number(scale * row[name], digits) for name in HALF_WIDTHS]
    low, high = bounds
    places = [100 * (row[n] - low) / ((high - low) or 1) for n in ("low", "mean", "high")]
    places = [50.0 if math.isnan(place) else min(max(place, 0.0), 100.0) for place in places]
    bar = (round(places[0], 1), round(places[1], 1), round(places[2], 1))
    return [mean, Shown("", bar=bar), *halves, seeds]


def _number(value: float, digits: int) -> Shown:
    """A figure; empty where nothing was measured."""
    return Shown("") if pd.isna(value) else Shown(f"{value:,.{digits}f}", f"{value:.6g}")


def _cost(row: pd.Series[Any], name: str) -> Shown:
    """A median, with the interquartile range of the repeats beside a time."""
    _, unit, digits = MEASURED[name]
    digits = digits_of(row[name] / unit, digits)
    shown, spread = _number(row[name] / unit, digits), row.get(f"{name}_iqr")
    if pd.isna(row[name]) or pd.isna(spread):
        return shown
    return replace(shown, text=f"{shown.text} ({spread / unit:,.{digits}f})")


# Charts and matrices


def _charts(found: Tables) -> list[dict[str, Any]]:
    """The charts that this run has something for."""
    axes = list(dict.fromkeys(found.sensitivity["axis"]))
    choices = {"sensitivity-axis": [(name, name.replace("_", " ")) for name in axes]}
    return [
        chart
        | {
            "controls": [
                control | {"options": choices.get(control["id"], control["options"])}
                for control in chart.get("controls", [])
            ]
        }
        for chart in CHARTS
        if axes or chart["id"] != "sensitivity"
    ]


def _chart_data(found: Tables, tasks: Sequence[Task]) -> dict[str, Any]:
    """The numbers behind the charts, in the units that are shown."""
    styles = {label: i for i, label in enumerate(dict.fromkeys(found.leaderboard["label"]))}
    entries = []
    scales = {}
    for task in tasks:
        for _, row in task.rows.iterrows():
            scales[row["entry"]] = task.scale
            scaled = {n: _short(task.scale * row[n]) for n in ("mean", "ci_seeds", "ci_episodes")}
            costs = {name: _short(row[name] / unit) for name, (_, unit) in COSTS.items()}
            fronts = {f"pareto_{name}": bool(row[f"pareto_{name}"]) for name in COSTS}
            words = {"label": row["label"], "score": findings.headline(row), "over": row["over"]}
            counts = {"seeds": int(row["seeds"]), "episodes": int(row["episodes"])}
            place = {"entry": row["entry"], "task": task.index, "style": styles[row["label"]]}
            entries.append(place | words | counts | scaled | costs | fronts)
    return {
        "palette": plots.PALETTE,
        "tasks": [
            {"index": t.index, "name": t.name, "axis": t.axis, "chance": t.chance} for t in tasks
        ],
        "entries": entries,
        "adaptation": _points(found.adaptation, scales),
        "learning": _points(found.learning, scales),
        "sensitivity": _points(found.sensitivity, scales),
        "growth": _points(found.growth, dict.fromkeys(scales, 1.0)),
    }


def _points(frame: pd.DataFrame, scales: dict[int, float]) -> dict[str, Any]:
    """The rows of a curve, as shown; the columns are named once, for there may be thousands."""
    scale = frame["entry"].map(scales)
    scaled = frame.assign(**{name: frame[name] * scale for name in ("mean", "low", "high")})
    rows = [
        [_short(value) if isinstance(value, float) else value for value in row]
        for row in scaled.itertuples(index=False)
    ]
    return {"columns": list(frame.columns), "rows": rows}


def _short(value: float) -> float | None:
    """Five digits, which is more than a chart shows; nothing for what is no number."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _matrix(task: Task, rows: Sequence[Row]) -> dict[str, Any]:
    """The differences of a task's entries, row minus column."""
    everybody = task.rows["label"].tolist()
    names = everybody[:MOST_PAIRED]
    shown = set(names)
    rows = [row for row in rows if {row.algorithm_a, row.algorithm_b} <= shown]
    found = {(row.algorithm_a, row.algorithm_b): row for row in rows}
    overs = sorted({f"over {getattr(row, row.over)} {row.over}" for row in rows})
    return {
        "task": task.index,
        "name": task.name,
        "unit": "points of accuracy"
        if task.metric == "accuracy"
        else "difference of squared error",
        "over": " or ".join(overs),
        "unlike": any(row.unlike for row in rows),
        "labels": names,
        "entries": len(everybody),
        "rows": [
            {"label": a, "cells": [_difference(task, a, b, found) for b in names]} for a in names
        ],
        "sentences": [row.sentence() for row in rows],
    }


def _difference(task: Task, a: str, b: str, found: dict[tuple[str, str], Row]) -> dict[str, str]:
    """A cell of the matrix."""
    if a == b:
        return {"text": "–", "kind": "self"}
    row, sign = (found[a, b], 1) if (a, b) in found else (found.get((b, a)), -1)
    if row is None:
        return {"text": "not compared", "kind": "self"}
    digits = decimals(task.metric, row.difference, (row.high - row.low) / 2)
    mean = sign * task.scale * row.difference
    low, high = sorted((sign * task.scale * row.low, sign * task.scale * row.high))
    kind = "" if not row.better else "better" if row.better == a else "worse"
    mark = {"": "", "better": " ▲", "worse": " ▼"}[kind] + (" ≠" if row.unlike else "")
    return {
        "text": f"{mean:+.{digits}f}{mark}".replace("-", "−"),
        "interval": f"[{low:.{digits}f}, {high:.{digits}f}]".replace("-", "−"),
        "kind": kind,
    }


def _picture(figure: Figure) -> str:
    """A figure as an address that holds all of it."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", bbox_inches="tight", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(drawn.getvalue()).decode()}"


# The rest


def _environment(path: Path) -> list[tuple[str, str]]:
    """What ``environment.json`` says, a line each; nothing where it cannot be read."""
    try:
        written = read_json(path)
        rows = written.items() if isinstance(written, dict) else []
        return [(key.replace("_", " "), _said(value)) for key, value in rows if _said(value)]
    except (OSError, ValueError, RecursionError):
        return []


def _said(value: Any) -> str:
    """A value of ``environment.json`` for people; empty for what is not known."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_said(part)}" for key, part in value.items() if _said(part))
    if isinstance(value, list):
        return ", ".join(map(_said, value))
    return "" if value is None else str(value)


def _settings(board: pd.DataFrame) -> dict[str, Any]:
    """Every setting of every entry; those that nobody changed from nothing are left out."""
    outcomes = {"entry", "label", "metric", "mean", "ci95", *HALF_WIDTHS, "low"}
    outcomes |= {
        "high",
        "over",
        "failed",
        "diverged",
        "seeds",
        *COSTS,
        *(f"pareto_{name}" for name in COSTS),
    }
    outcomes |= {"algorithm", *MEASURED, *(f"{name}_iqr" for name in COSTS)}
    names = [str(n) for n in board if n not in outcomes and board[n].notna().any()]
    return {
        "titles": ["algorithm", *(name.replace("_", " ") for name in names)],
        "rows": [
            [row["label"], *(plain(row[name]) for name in names)] for _, row in board.iterrows()
        ],
    }
