"""A run's leaderboard for a pull request (Markdown) and for a paper (LaTeX, booktabs)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import pandas as pd

from bench.comparison import Row
from bench.errors import printable
from bench.failures import lost, scoreless
from bench.findings import Task, headline, level_with_best, task_name, tasks, verdict
from bench.results import COUNTS
from bench.tables import Tables, varying
from bench.wording import OVERS, decimals, plain

INTERVALS = (
    "± is half of a 95% interval: over seeds it speaks of the algorithm, trained again (on these "
    "test episodes); over episodes of this trained model, on new tasks. Times are medians; in "
    "brackets, the interquartile range of the repeats."
)


HALF = "$\\pm$: half of the 95\\% interval"


ROWS, NOTES = 100, 20
"""At most so many in Markdown: a comment on GitHub holds 65,536 characters."""


def markdown(
    name: str, tables: Tables, rows: Sequence[Row], notes: Sequence[str], command: str
) -> str:
    """The report for a pull request."""
    board = tables.leaderboard
    settings = varying(board)
    titles = ["task", "algorithm", *(s.replace("_", " ") for s in settings), "score"]
    titles += ["samples a step", "gradients a step", "meta-step, ms", "memory, MiB"]
    lines = [f"## {md(name)}", "", INTERVALS, "", _md_row(titles)]
    lines.append("|---|---|" + "---:|" * (len(titles) - 2))
    for _, row in board.head(ROWS).iterrows():
        score = f"**{scoreless(row)}**" if row["seeds"] == 0 else md(headline(row))
        if row["seeds"] and row["failed"]:
            score += f" (without {lost(row)})"
        memory = row["peak_memory_bytes"] / 2**20
        time, spread = _number(row["step_ms"], 1), _number(row.get("step_ms_iqr", math.nan), 1)
        time = f"{time} ({spread})" if spread else time
        lines.append(
            _md_row(
                [md(task_name(row, board)), md(row["label"])]
                + [md(plain(row[setting])) for setting in settings]
                + [score, *(_number(row[count], 0) for count in COUNTS), time]
                + [_number(memory, 0)]
            )
        )
    lines += [*_more(len(board) - ROWS, "rows"), ""]
    found = tasks(board)
    for task in found[:ROWS]:
        said = verdict(task, rows)
        text = " ".join([f"best mean: {said.leader}.", *said.lines])
        lines.append(f"- **{md(task.name)}**: {md(text)}")
    lines += _more(len(found) - ROWS, "tasks")
    if not tables.faults.empty:
        lines += ["", f"Not here ({len(tables.faults)}):", ""]
        for fault in tables.faults.head(NOTES).itertuples():
            reason = str(fault.reason).strip().splitlines()[-1:]
            lines.append(f"- {md(str(fault.cell))}: {fault.status}: {md(' '.join(reason))}")
        lines += _more(len(tables.faults) - NOTES, "cells")
    if notes:
        lines += ["", *(f"- {md(note)}" for note in notes[:NOTES])]
        lines += _more(len(notes) - NOTES, "notes")
    if command:
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))
        lines += ["", fence, command, fence]
    return "\n".join(lines) + "\n"


def _more(count: int, what: str) -> list[str]:
    return ["", f"and {count:,} more {what}: see report.html"] if count > 0 else []


def latex(tables: Tables, rows: Sequence[Row]) -> str:
    """A booktabs table a dataset: entries down, tasks across."""
    board = tables.leaderboard
    found = tasks(board)
    datasets = list(dict.fromkeys((task.setting[0], task.setting[3]) for task in found))
    several = len({device for _, device in datasets}) > 1
    parts = ["% \\usepackage{booktabs}"]
    for dataset, device in datasets:
        mine = [t for t in found if (t.setting[0], t.setting[3]) == (dataset, device)]
        everybody = board[(board["dataset"] == dataset) & (board["device"] == device)]
        title = f"{dataset} on {device}" if several else dataset
        parts.append(_table(title, mine, everybody, rows))
    return "\n\n".join(parts) + "\n"


def _table(title: str, found: Sequence[Task], board: pd.DataFrame, rows: Sequence[Row]) -> str:
    """Of one dataset on one device: its tasks, and all of its entries, also without a score."""
    settings = varying(board)
    names = list(dict.fromkeys(board["label"]))
    titles = ["algorithm", *(name.replace("_", " ") for name in settings)]
    shots = "" if found[0].metric == "mse" else "{}-way "
    heads = [f"{shots.format(t.setting[1])}{t.setting[2]}-shot" for t in found]
    mixed = board.loc[board["seeds"] > 0, "over"].nunique() > 1
    columns = [_column(task, board, rows, mixed) for task in found]
    body = []
    for name in names:
        mine = board[board["label"] == name]
        # A setting that changes from task to task is listed in their order.
        values = [" / ".join(dict.fromkeys(map(plain, mine[setting]))) for setting in settings]
        scores = [column.get(name, "--") for column in columns]
        body.append(_tex_row([*map(tex, [name, *values]), *scores]))
    metric = "accuracy (\\%)" if found[0].metric == "accuracy" else "mean squared error"
    return "\n".join(
        [
            "\\begin{table}",
            "\\centering",
            f"\\caption{{{tex(title)}, {metric} {_caption(board, bool(rows))}}}",
            f"\\begin{{tabular}}{{l{'r' * len(settings)}{'c' * len(found)}}}",
            "\\toprule",
            _tex_row([*map(tex, titles), *heads]),
            "\\midrule",
            *body,
            "\\bottomrule",
            "\\end{tabular}",
            "\\end{table}",
        ]
    )


def _caption(board: pd.DataFrame, compared: bool) -> str:
    parts = ["after the last inner step."]
    seeds, models = board[board["over"] == "seeds"], board[board["over"] == "episodes"]
    if not seeds.empty:
        counts = "--".join(str(n) for n in sorted({seeds["seeds"].min(), seeds["seeds"].max()}))
        parts.append(f"{HALF} {OVERS['seeds'].replace('seeds', f'{counts} seeds', 1)}.")
    if not models.empty:
        start = HALF if seeds.empty else "$^\\dagger$: one seed, interval"
        parts.append(f"{start} {OVERS['episodes']}.")
    lesser = board[(board["failed"] > 0) & (board["seeds"] > 0)]
    less = [f"{tex(row['label'])}: {lost(row)}" for _, row in lesser.iterrows()]
    if less:
        parts.append(f"Without seeds that came to nothing ({'; '.join(dict.fromkeys(less))}).")
    if compared:
        parts.append("Bold: the best mean, and what it is not shown to beat (Holm, 5\\%).")
    return " ".join(parts)


def _column(task: Task, board: pd.DataFrame, rows: Sequence[Row], mixed: bool) -> dict[str, str]:
    """The scores of a task by their entry, or what became of those that have none.

    Args:
        task: the column.
        board: the entries of all columns.
        rows: what was compared.
        mixed: some intervals of the table are over seeds, and some over episodes.
    """
    bold = level_with_best(task, rows) if rows else []
    here = (board["ways"] == task.setting[1]) & (board["shots"] == task.setting[2])
    lost_here = board[here & (board["seeds"] == 0)]
    cells = {row["label"]: scoreless(row) for _, row in lost_here.iterrows()}
    for _, row in task.rows.iterrows():
        over_seeds = row["over"] == "seeds"
        half = row["ci_seeds"] if over_seeds else row["ci_episodes"]
        digits = decimals(task.metric, row["mean"], half)
        mean = f"{task.scale * row['mean']:.{digits}f}"
        if row["label"] in bold:
            mean = f"\\mathbf{{{mean}}}"
        width = "" if pd.isna(half) else f" \\pm {task.scale * half:.{digits}f}"
        mark = "^\\dagger" if mixed and not over_seeds else ""
        cells[row["label"]] = f"${mean}{width}{mark}$"
    return cells


def _number(value: float, digits: int) -> str:
    return "" if pd.isna(value) else f"{value:.{digits}f}"


def md(text: str) -> str:
    """Text that Markdown, the HTML in it, and GitHub's mentions and formulas leave as it is."""
    escaped = re.sub(r"([\\`*_\[\]|~$@#!])", r"\\\1", " ".join(str(text).split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _md_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _tex_row(cells: Sequence[str]) -> str:
    return f"{' & '.join(cells)} \\\\"


def tex(text: str) -> str:
    """Text that LaTeX leaves as it is."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {"<": r"\textless{}", ">": r"\textgreater{}"}
    special |= {"[": "{[}", "*": "{*}"}  # after the end of a row, these would be told to it
    line = printable(str(text))
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in line)
