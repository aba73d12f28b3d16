"""Figures for a paper: seaborn, as PNG and SVG, legible in grey and to colour-blind readers."""

from __future__ import annotations

import errno
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from bench.failures import lost
from bench.files import whole
from bench.naming import PLACE, in_order, labelled
from bench.stats import mean_interval
from bench.tables import COSTS, Tables, best_first
from bench.wording import OVERS

matplotlib.use("Agg")

# Apart for colour-blind readers, and of 3:1 contrast on white and on black.
PALETTE = (
    *("#3478c6", "#d0641a", "#1f9670", "#b455a8"),
    *("#8a7a12", "#d14a61", "#6b7785", "#1a93ad"),
)
THIN = {"grid.linewidth": 0.6, "axes.linewidth": 0.8, "grid.color": "0.88"}
MIXED = "over seeds, or over episodes for one seed"
LINES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1)), (0, (3, 1, 1, 1, 1, 1)))
MARGIN_INCHES = 0.1
DPI = 200
MOST_TICKS = 8
"""Swept values that are written at an axis, each where it is; for more, round numbers are."""
MOST_DRAWN = 20
"""Entries of a task that a figure shows, the best: of hundreds none could be told apart."""
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "*")


def draw_all(summary: pd.DataFrame, folder: Path, swept: Sequence[str] = ()) -> list[Path]:
    """Draw what a summary allows; the paths of what was drawn.

    Args:
        summary: the rows.
        folder: where the figures go.
        swept: settings that tell rows of one algorithm apart: each is drawn for itself.
    """
    rows = [
        dict(zip((*PLACE, *swept), values, strict=True))
        for values in summary[[*PLACE, *swept]].itertuples(index=False)
    ]
    summary = summary.assign(algorithm=labelled(rows))
    complete = summary[summary["status"] == "complete"]
    if complete.empty:
        return []
    without = summary[summary["status"] != "complete"]
    counts = Counter(zip(without["algorithm"], without["status"], strict=True))
    figure = accuracy(_without_formulas(complete))
    _say_left_out(figure, [f"{name} ({n} {status})" for (name, status), n in counts.items()])
    return save(figure, folder / "accuracy")


def _say_left_out(figure: Figure, who: Sequence[str]) -> None:
    """Name, below a figure, what has no score in it, and why."""
    if who:
        text = textwrap.fill(f"left out: {as_text(', '.join(who))}", 80)
        figure.supxlabel(f"{figure.get_supxlabel()}\n{text}", fontsize="small")


def as_text(name: object) -> str:
    """A name that matplotlib does not take for a formula."""
    return str(name).replace("$", r"\$")


def save(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PNG and SVG, each whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent.is_symlink():  # to a place that is not this run's
        raise OSError(errno.ELOOP, f"{path.parent.name} is a link to elsewhere")
    figure.set_dpi(DPI)  # hinting makes text at another resolution wider, or narrower, by a little
    if engine := figure.get_layout_engine():  # once for both: with many panels it takes longest
        engine.execute(figure)
        figure.set_layout_engine(None)  # "none" would keep one, for which savefig draws twice
    bounds = figure.get_tightbbox().padded(MARGIN_INCHES)
    written = []
    for kind, metadata in (("png", {}), ("svg", {"Date": None})):
        target = path.with_name(f"{path.name}.{kind}")
        with whole(target) as aside:
            figure.savefig(aside, format=kind, dpi=DPI, bbox_inches=bounds, metadata=metadata)
        written.append(target)
    return written


def intervals(summary: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Mean and half-width by algorithm and setting, and what the intervals speak of.

    With two seeds or more the interval is over seeds (the algorithm, trained again), else over
    test episodes (this trained model on new tasks).
    """
    keys = ["dataset", "ways", "shots", "device", "metric", "algorithm"]
    rows, seeds = [], set()
    for key, group in summary.groupby(keys):
        mean, half = group[["mean", "ci95"]].iloc[0]
        if len(group) > 1:
            interval = mean_interval(group["mean"].to_numpy(), over="seeds")
            mean, half = interval.estimate, interval.half_width
        rows.append((*key, mean, half))
        seeds.add(len(group))
    meaning = OVERS["episodes"]
    if several := sorted(seeds - {1}):
        count = " to ".join(str(n) for n in dict.fromkeys((several[0], several[-1])))
        meaning = MIXED if 1 in seeds else OVERS["seeds"]
        meaning = meaning.replace("seeds", f"{count} seeds", 1)
    return pd.DataFrame(rows, columns=[*keys, "mean", "ci95"]), meaning


def accuracy(summary: pd.DataFrame) -> Figure:
    """A summary's scores by algorithm and shots, in the order and colours of a report's."""
    scores, meaning = intervals(summary)
    return scores_by_shots(best_first(scores, "algorithm"), meaning)


def scores_by_shots(scores: pd.DataFrame, meaning: str) -> Figure:
    """Accuracy (or error) by algorithm and shots, a panel a dataset and number of ways.

    Args:
        scores: columns as :func:`intervals` gives them.
        meaning: what the intervals speak of.
    """
    sns.set_theme(style="whitegrid", font_scale=0.9, rc=THIN)
    algorithms = list(dict.fromkeys(scores["algorithm"]))
    if scores["device"].nunique() > 1:
        scores = scores.assign(dataset=scores["dataset"] + " on " + scores["device"])
    panels = list(scores.groupby(["dataset", "ways", "metric"], sort=False))
    width = 0.9 + 0.08 * max(map(len, algorithms)) + 3.4 * len(panels)
    figure = Figure(figsize=(width, 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (_, panel) in zip(axes, panels, strict=True):
        _panel(axis, panel, algorithms)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    figure.supxlabel(f"shots; bars: 95% intervals {meaning}", fontsize="small")
    return figure


def _panel(axis: Axes, panel: pd.DataFrame, algorithms: list[str]) -> None:
    dataset, ways, metric = panel[["dataset", "ways", "metric"]].iloc[0]
    shots = sorted(panel["shots"].unique())
    for index, name in enumerate(algorithms):
        mine = panel[panel["algorithm"] == name].sort_values("shots")
        beside = min(0.12, 0.9 / len(algorithms)) * (index - (len(algorithms) - 1) / 2)
        axis.errorbar(
            [shots.index(s) + beside for s in mine["shots"]],
            mine["mean"],
            yerr=mine["ci95"],
            label=name,
            color=PALETTE[index % len(PALETTE)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=4,
            linestyle="none",
            capsize=4,
            elinewidth=1.2,
        )
    axis.set_xticks(range(len(shots)), [str(s) for s in shots])
    axis.set_xlim(-0.5, len(shots) - 0.5)
    axis.grid(False, axis="x")
    if metric == "accuracy":
        axis.set_title(f"{dataset}, {ways}-way", fontsize="medium")
        axis.axhline(1 / ways, color="0.4", linestyle=":", linewidth=1)
        axis.text(len(shots) - 0.52, 1 / ways, "chance", ha="right", va="bottom", color="0.3")
        axis.set_ylim(0, 1)
        axis.yaxis.set_major_formatter(PercentFormatter(1))
        axis.set_ylabel("accuracy on new classes")
    else:
        axis.set_title(dataset, fontsize="medium")
        axis.set_ylim(bottom=0)
        axis.set_ylabel("mean squared error")


# Of a report's tables


def draw_tables(tables: Tables, folder: Path) -> list[Path]:
    """Draw a report's figures; the paths of what was drawn, none where nothing is complete."""
    everybody = _without_formulas(tables.leaderboard[tables.leaderboard["seeds"] > 0])
    if everybody.empty:
        return []
    board = everybody.groupby(["dataset", "ways", "shots", "device"], sort=False).head(MOST_DRAWN)
    half = (board["high"] - board["low"]) / 2
    scores = board.assign(algorithm=board["label"], ci95=half)
    overs = set(board["over"])
    meaning = OVERS[overs.pop()] if len(overs) == 1 else MIXED
    figures = {
        "accuracy": scores_by_shots(scores, meaning),
        "adaptation": adaptation(board, tables.adaptation),
        "learning": learning(board, tables.learning, "iteration"),
        "learning_seconds": learning(board, tables.learning, "seconds"),
        "cost": cost(board, "step_ms", meaning),
        "memory": cost(board, "peak_memory_bytes", meaning),
    }
    if len(tables.sensitivity):
        figures["sensitivity"] = sensitivity(
            everybody, _without_formulas(tables.sensitivity), meaning
        )
    if len(tables.growth):
        figures["memory_steps"] = growth(board, tables.growth)
    less = tables.leaderboard[tables.leaderboard["failed"] > 0]
    for figure in figures.values():
        _say_left_out(figure, [f"{row['label']} ({lost(row)})" for _, row in less.iterrows()])
    if len(board) < len(everybody):
        for name in figures.keys() - {"sensitivity"}:
            figures[name].suptitle(f"the {MOST_DRAWN} best of each task", fontsize="small")
    return [path for name, figure in figures.items() for path in save(figure, folder / name)]


def _without_formulas(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with its names as :func:`as_text` has them."""
    names = frame.columns.intersection(
        ["algorithm", "dataset", "device", "label", "line", "axis", "value"]
    )
    return frame.assign(
        **{
            str(name): [as_text(v) if isinstance(v, str) else v for v in frame[name]]
            for name in names
        }
    )


def adaptation(board: pd.DataFrame, points: pd.DataFrame) -> Figure:
    """The score after 0, 1, ... inner steps, as Finn et al. 2017 draw it."""
    figure, panels = _grid(
        board, "inner steps; bands: 95% intervals over episodes (these trained models on new tasks)"
    )
    for axis, entries in panels:
        _curves(axis, entries, points, "step", board)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return figure


def growth(board: pd.DataFrame, points: pd.DataFrame) -> Figure:
    """Peak memory of a meta-step on few tasks over its inner steps."""
    figure, panels = _grid(board, "inner steps of a meta-step; bands: lowest to highest seed")
    for axis, entries in panels:
        _curves(axis, entries.assign(metric="memory"), points, "step", board)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axis.set_ylabel("peak memory, MiB")
        axis.set_ylim(bottom=0)
    return figure


def sensitivity(board: pd.DataFrame, points: pd.DataFrame, meaning: str) -> Figure:
    """The score over the values of each swept setting, a panel a setting and task.

    Args:
        board: the leaderboard.
        points: as in :class:`bench.tables.Tables`.
        meaning: what the intervals speak of.
    """
    places = board[["entry", "dataset", "ways", "shots", "device", "metric"]]
    lines = points.merge(places, on="entry").assign(label=points["line"])
    figure, panels = _grid(lines, f"bars: 95% intervals {meaning}", by=["axis"])
    for axis, mine in panels:
        scale = _scale(mine)
        values = sorted(mine["value"].unique(), key=in_order)
        numbers = all(isinstance(value, int | float) for value in values)
        for label, line in mine.groupby("label", sort=False):
            style = _style(str(label), lines)
            axis.errorbar(
                line["value"] if numbers else [values.index(value) for value in line["value"]],
                scale * line["mean"],
                yerr=scale * (line["high"] - line["low"]).fillna(0) / 2,
                **style | ({} if numbers else {"linestyle": "none"}),
                markersize=5,
                capsize=3,
                elinewidth=1,
            )
        if numbers and spans(values):
            axis.set_xscale("log")
            axis.xaxis.set_minor_locator(NullLocator())
        if len(values) <= MOST_TICKS:
            axis.set_xticks(
                values if numbers else range(len(values)),
                [f"{v:g}" if numbers else v for v in values],
            )
        axis.set_xlabel(mine["axis"].iloc[0].replace("_", " "))
        axis.grid(False, axis="x")
    return figure


def spans(values: Sequence[float]) -> bool:
    """Whether values are so far apart that a logarithmic axis shows them better."""
    return min(values) > 0 and max(values) >= 8 * min(values)


def learning(board: pd.DataFrame, points: pd.DataFrame, against: str) -> Figure:
    """The score on validation episodes (training tasks where there are none) during training."""
    of = "validation" if (points["of"] == "validation").any() else "training"
    title = {"iteration": "iterations", "seconds": "seconds of training"}[against]
    figure, panels = _grid(board, f"{title}, scored on {of} tasks; bands: lowest to highest seed")
    for axis, entries in panels:
        _curves(axis, entries, points[points["of"] == of], against, board)
    return figure


def cost(board: pd.DataFrame, measure: str, meaning: str) -> Figure:
    """Score against cost; the Pareto front is joined, and its entries are filled."""
    title, unit = COSTS[measure]
    note = f"{title}; filled: Pareto front; bars: 95% intervals {meaning}"
    figure, panels = _grid(board, note, lines=False)
    for axis, entries in panels:
        known = entries[entries[measure].notna()]
        scale = _scale(entries)
        for _, row in known.iterrows():
            style = _style(row["label"], board)
            on_front = row[f"pareto_{measure}"]
            axis.errorbar(
                row[measure] / unit,
                scale * row["mean"],
                yerr=None if pd.isna(row["low"]) else scale * (row["high"] - row["low"]) / 2,
                color=style["color"],
                marker=style["marker"],
                markersize=7,
                markerfacecolor=style["color"] if on_front else "white",
                elinewidth=1,
                linestyle="none",
            )
        front = known[known[f"pareto_{measure}"]].sort_values(measure)
        axis.step(
            front[measure] / unit,
            scale * front["mean"],
            where="post",
            color="0.4",
            linestyle=":",
            linewidth=1.2,
            zorder=0,
        )
        if len(known) and known[measure].max() > 8 * known[measure].min() > 0:
            axis.set_xscale("log")
        axis.grid(False, axis="x")
    return figure


def _grid(
    board: pd.DataFrame, note: str, lines: bool = True, by: Sequence[str] = ()
) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """A figure with a panel for each setting (and value of the columns ``by``), a legend of all
    entries, and a line of text."""
    sns.set_theme(style="whitegrid", font_scale=0.9, rc=THIN)
    settings = list(board.groupby(["dataset", "ways", "shots", "device", *by], sort=False))
    columns = min(4, len(settings))
    rows = -(-len(settings) // columns)
    width = 1.0 + 0.08 * board["label"].str.len().max() + 3.3 * columns
    figure = Figure(figsize=(width, 0.6 + 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[len(settings) :]:
        unused.remove()
    panels = []
    for axis, ((dataset, ways, shots, device, *_), entries) in zip(axes, settings, strict=False):
        accurate = entries["metric"].iloc[0] == "accuracy"
        shape = f"{ways}-way {shots}-shot" if accurate else f"{shots}-shot"
        where = f", {device}" if board["device"].nunique() > 1 else ""
        axis.set_title(f"{dataset}, {shape}{where}", fontsize="medium")
        axis.set_ylabel("accuracy, %" if accurate else "mean squared error")
        panels.append((axis, entries))
    names = list(dict.fromkeys(board["label"]))
    styles = [_style(name, board) for name in names]
    handles = [
        Line2D([], [], **(style if lines else style | {"linestyle": "none"})) for style in styles
    ]
    figure.legend(handles, names, loc="outside right upper", frameon=False)
    figure.supxlabel(note, fontsize="small")
    return figure, panels


def _curves(
    axis: Axes, entries: pd.DataFrame, points: pd.DataFrame, x: str, board: pd.DataFrame
) -> None:
    """A line with its band for each entry that has points."""
    scale = _scale(entries)
    for _, row in entries.iterrows():
        mine = points[points["entry"] == row["entry"]]
        style = _style(row["label"], board)
        every = max(1, len(mine) // 8)
        axis.plot(mine[x], scale * mine["mean"], markevery=every, markersize=5, **style)
        low, high = scale * mine["low"], scale * mine["high"]
        axis.fill_between(mine[x], low, high, color=style["color"], alpha=0.12, linewidth=0)
    if entries["metric"].iloc[0] == "mse":
        axis.set_ylim(bottom=0)
    axis.grid(False, axis="x")


def _scale(entries: pd.DataFrame) -> float:
    return 100.0 if entries["metric"].iloc[0] == "accuracy" else 1.0


def _style(label: str, board: pd.DataFrame) -> dict[str, Any]:
    """An entry's colour, marker and line: the same in every figure, and apart without colour."""
    index = list(dict.fromkeys(board["label"])).index(label)
    return {
        "color": PALETTE[index % len(PALETTE)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index % len(LINES)],
    }
