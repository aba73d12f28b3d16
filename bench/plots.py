"""Figures for a paper: seaborn, as PNG and SVG, legible in grey and to colour-blind readers."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from bench.stats import mean_interval

matplotlib.use("Agg")

MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "*")


def draw_all(summary: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw what a summary allows; the paths of what was drawn."""
    complete = summary[summary["status"] == "complete"]
    if complete.empty:
        return []
    return save(accuracy(complete), folder / "accuracy")


def save(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PNG and SVG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path.with_suffix(".png"), path.with_suffix(".svg")]
    figure.savefig(written[0], dpi=200, bbox_inches="tight")
    figure.savefig(written[1], bbox_inches="tight", metadata={"Date": None})
    return written


def intervals(summary: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Mean and half-width by algorithm and setting, and what the intervals speak of.

    With two seeds or more the interval is over seeds (the algorithm, trained again), else over
    test episodes (this trained model on new tasks).
    """
    keys = ["dataset", "ways", "shots", "metric", "algorithm"]
    if summary.groupby(keys)["seed"].nunique().min() < 2:
        first = summary.drop_duplicates(keys)
        return first[[*keys, "mean", "ci95"]], "over test episodes (one trained model)"
    rows = []
    for key, group in summary.groupby(keys):
        interval = mean_interval(group["mean"].to_numpy(), over="seeds")
        rows.append((*key, interval.estimate, interval.half_width))
    seeds = summary.groupby(keys)["seed"].nunique().min()
    return pd.DataFrame(rows, columns=[*keys, "mean", "ci95"]), f"over {seeds} seeds"


def accuracy(summary: pd.DataFrame) -> Figure:
    """Accuracy (or error) by algorithm and shots, a panel a dataset and number of ways."""
    sns.set_theme(style="whitegrid", palette="colorblind", font_scale=0.9)
    scores, meaning = intervals(summary)
    algorithms = list(dict.fromkeys(scores["algorithm"]))
    panels = list(scores.groupby(["dataset", "ways", "metric"], sort=False))
    figure = Figure(figsize=(1.5 + 3.4 * len(panels), 3.6), layout="constrained")
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
    colours = sns.color_palette("colorblind", len(algorithms))
    for index, name in enumerate(algorithms):
        mine = panel[panel["algorithm"] == name].sort_values("shots")
        beside = 0.12 * (index - (len(algorithms) - 1) / 2)
        axis.errorbar(
            [shots.index(s) + beside for s in mine["shots"]],
            mine["mean"],
            yerr=mine["ci95"],
            label=name,
            color=colours[index],
            marker=MARKERS[index % len(MARKERS)],
            linestyle="none",
            capsize=3,
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
