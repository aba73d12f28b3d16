"""The table that a run ends with, and the notes below it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from bench.stats import mean_interval
from bench.wording import counted, milliseconds, plain, score

SETTINGS = (
    *("seed", "test_shots", "train_shots", "inner_steps", "eval_steps", "meta_batch"),
    *("iterations", "episodes", "protocol", "norm", "engine", "precision"),
    *("device", "source"),
)
"""What changes the meaning of a score: shown for each row where it varies, else below."""
SHARED = ("seed", "test_shots", "iterations", "episodes", "norm", "engine", "device")
"""Of those that do not vary, the ones that are said; the precision is where it is not float32."""


def summary_table(
    summary: pd.DataFrame, swept: Sequence[str] = (), width: int | None = None
) -> Table:
    """The summary for a terminal: the settings that all cells share stand below it.

    Args:
        summary: its rows.
        swept: settings that tell rows of one algorithm apart, to be shown besides the usual.
        width: columns of the terminal; costs that do not fit are left out, which is said.
    """
    varying, shared = _settings(summary, swept)
    ordered = summary.sort_values(["dataset", "ways", "shots"], kind="stable")
    rows = [row for _, row in ordered.iterrows()]
    costs = {head: [cost(row) for row in rows] for head, cost in COSTS.items()}
    measured = [head for head, each in costs.items() if any(each)]
    title = "± is the 95% interval over test episodes: this trained model on new tasks"
    for count in range(len(measured), -1, -1):
        shown, left_out = measured[:count], measured[count:]
        timed = any(head.endswith("ms") for head in shown)
        notes = ["times: median of the repeats (interquartile range)"] if timed else []
        if left_out:
            names = ", ".join(" ".join(head.split()) for head in left_out)
            notes = [f"too narrow for {names}: summary.csv has them"]
        notes += [f"all: {', '.join(shared)}"] if shared else []
        table = _table(title, notes, varying, ["score", *shown])
        for i, row in enumerate(rows):
            complete = row["status"] == "complete"
            said = unit_score(row) if complete else f"[red]{came_to_nothing(row)}[/red]"
            table.add_row(*_name(row, varying), said, *(costs[head][i] for head in shown))
        if width is None or Console(width=WIDE).measure(table).maximum <= width:
            break
    return table


def seeds_table(summary: pd.DataFrame, swept: Sequence[str] = ()) -> Table | None:
    """Means over seeds for a terminal; None where nothing was trained with two seeds or more.

    Args:
        summary, swept: as for :func:`summary_table`.
    """
    complete = summary[summary["status"] == "complete"]
    varying = [name for name in _settings(summary, swept)[0] if name != "seed"]
    entry = list(dict.fromkeys(["dataset", "ways", "shots", "algorithm", *varying]))
    found = []
    for _, rows in complete.groupby(entry, dropna=False, sort=False):
        means = mean_interval(rows["mean"], over="seeds")
        row = rows.iloc[0].copy()
        row["mean"], row["ci95"], row["seeds"] = means.estimate, means.half_width, means.n
        found.append(row)
    if all(row["seeds"] < 2 for row in found):
        return None
    title = "± is the 95% interval over seeds: the algorithm, trained again, on these test episodes"
    table = _table(title, [], varying, ["seeds", "score"])
    for row in found:
        table.add_row(*_name(row, varying), str(row["seeds"]), unit_score(row))
    return table


def _settings(summary: pd.DataFrame, swept: Sequence[str]) -> tuple[list[str], list[str]]:
    """The settings that rows differ in, and in words those that all share."""
    settings = [name for name in dict.fromkeys([*SETTINGS, *swept]) if name in summary]
    # What failed has the settings that it was asked for, such as an engine by rule; the others
    # have those that ran.
    complete = summary["status"] == "complete"
    told = summary[complete] if complete.any() else summary
    varying = [name for name in settings if _varies(name, told)]
    rounded = "precision" in told and (told["precision"].dropna() != "float32").any()
    shared = [
        f"{name.replace('_', ' ')} {told[name].iloc[0]}"
        for name in (*SHARED, *(["precision"] if rounded else []), *swept)
        if told[name].nunique(dropna=False) == 1 and told[name].notna().all()
    ]
    return varying, shared


def _table(
    title: str, notes: Sequence[str], varying: Sequence[str], figures: Sequence[str]
) -> Table:
    table = Table(
        title=title,
        caption="\n".join(notes),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
        caption_justify="left",
    )
    table.add_column("algorithm", no_wrap=True)
    table.add_column("episodes of", no_wrap=True)
    for head in (*(name.replace("_", "\n") for name in varying), *figures):
        table.add_column(head, justify="right", no_wrap=True)
    return table


def _name(row: pd.Series[Any] | Mapping[str, Any], varying: Sequence[str]) -> list[str]:
    """What tells a row from the others."""
    task = f"{row['dataset']} {row['ways']}w{row['shots']}s"
    return [row["algorithm"], task, *(plain(row[name], "") for name in varying)]


def unit_score(row: pd.Series[Any] | Mapping[str, Any]) -> str:
    """A score that says what it is: ``81.3 ± 0.7%``, ``mse 0.59 ± 0.07``."""
    return score(row) if row["metric"] == "accuracy" else f"{row['metric']} {score(row)}"


def _mebibytes(row: pd.Series[Any]) -> str:
    peak = row["peak_memory_bytes"]
    return "" if pd.isna(peak) else f"{peak / 2**20:.0f}"


COSTS: dict[str, Callable[[pd.Series[Any]], str]] = {
    "meta-step\nms": lambda row: milliseconds(row["step_ms"], row["step_ms_iqr"]),
    "episode\nms": lambda row: milliseconds(
        row["eval_ms_per_episode"], row["eval_ms_per_episode_iqr"]
    ),
    "peak\nMiB": _mebibytes,
}
"""The costs in the table; the last are the first to be left out."""
WIDE = 1000


def _varies(name: str, summary: pd.DataFrame) -> bool:
    """Whether rows differ in a setting; training with the shots of the test is the same for all,
    whatever their number."""
    if name == "train_shots" and (summary["train_shots"] == summary["shots"]).all():
        return False
    return bool(summary[name].nunique(dropna=False) > 1)


def came_to_nothing(row: pd.Series | dict[str, object]) -> str:
    """What to show for the score of a cell that has none."""
    if row["status"] == "diverged":
        return f"diverged at {row['diverged_at']:.0f}"
    return str(row["status"])


def reuse_notes(summary: pd.DataFrame) -> list[str]:
    """A warning for each dataset whose test samples the episodes share."""
    notes = []
    reused = summary[(summary["sample_reuse"] > 1) & (summary["status"] == "complete")]
    for dataset, rows in reused.groupby("dataset"):
        wider = rows.get("ci95_classes", pd.Series(dtype=float)).dropna()
        ends = [f"{100 * end:.1f}" for end in (wider.min(), wider.max())]
        about = f" (± {' to '.join(dict.fromkeys(ends))}%: ci95_classes)" if len(wider) else ""
        most = rows.sort_values("sample_reuse").iloc[-1]
        notes.append(
            f"note:  {most['episodes']} episodes use each of {dataset}'s test samples "
            f"{most['sample_reuse']:.1f} times, so that these intervals understate the "
            f"uncertainty about new classes{about}; --protocol disjoint shares none"
        )
    return notes


def gradient_notes(summary: pd.DataFrame) -> list[str]:
    """How well the engines' gradients agree, where that was asked for."""
    errors = summary["gradient_error"].dropna()
    if errors.empty:
        return []
    worst = f"{errors.max():.1g}" if errors.max() else "0"
    return [
        f"note:  after training, gradients of {counted(len(errors), 'cell')} are within {worst} of "
        "the reference's (gradient_error)"
    ]


PUBLISHED = {"people": 4.5, "BPL": 3.3, "siamese network": 8.0, "convolutional network": 13.5}
"""Errors in the one-shot challenge, %, as Lake et al. 2015 give them; recalled, not yet checked
against the paper."""


def challenge_notes(summary: pd.DataFrame) -> list[str]:
    """Errors in Omniglot's one-shot challenge, ours beside the published ones."""
    ours = summary[(summary["protocol"] == "lake") & (summary["status"] == "complete")]
    if ours.empty:
        return []
    errors = ", ".join(
        f"{row['algorithm']} {100 * (1 - row['mean']):.1f} ± {100 * row['ci95']:.1f}% "
        f"(seed {row['seed']}, norm {'none' if pd.isna(row['norm']) else row['norm']})"
        for _, row in ours.iterrows()
    )
    published = ", ".join(f"{name} {error}%" for name, error in PUBLISHED.items())
    note = (
        f"note:  errors over {ours['episodes'].iloc[0]} runs: {errors}; Lake et al. 2015 "
        f"(recalled): {published}"
    )
    if (ours["norm"] == "transductive").any():
        note += "; they classify one drawing at a time, which norm transductive does not"
    return [note]
