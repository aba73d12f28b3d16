"""Write the tables and the figure of docs/performance.md from what ``make bench-peers`` measured.

    python docs/performance.py [.benchmarks/peers.json]

A file that is named is kept in docs/performance.json first, which the page is always made from. One
of some settings takes the place of those alone, where the machine is the same; the page says so.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from scipy import stats

from bench.files import filled, whole, write_text
from bench.plots import MARKERS, PALETTE, THIN
from bench.stats import paired_ratio

HERE = Path(__file__).resolve().parent
PAGE = HERE / "performance.md"
MEASURED = HERE / "performance.json"
FIGURE = HERE / "performance-scaling.png"
OURS = "batched"
ENGINES = ("batched", "higher")
MIB = 2.0**20
EPISODES = 600
"""Evaluation episodes that papers take; time and work are in proportion to their number."""

Row = dict[str, Any]


class Slope(NamedTuple):
    """The exponent of a power law, with its 95% interval."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:.2f} [{self.low:.2f}, {self.high:.2f}]"


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> Slope:
    """That of seconds over sizes, by least squares on logarithms, with Student's t interval.

    At least three sizes."""
    fit = stats.linregress(np.log(sizes), np.log(seconds))
    half = float(stats.t.ppf(0.975, len(sizes) - 2) * fit.stderr)
    return Slope(float(fit.slope), float(fit.slope) - half, float(fit.slope) + half)


def subjects(measured: Row) -> list[str]:
    """Every subject that some setting names, the fast engine first."""
    found = dict.fromkeys(name for row in measured["settings"].values() for name in row["subjects"])
    return sorted(found, key=lambda name: name != OURS)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def milliseconds(seconds: float) -> str:
    """With three digits or all of the whole ones."""
    return f"{1e3 * seconds:.{max(0, 2 - math.floor(math.log10(1e3 * seconds)))}f}"


def timed(row: Row) -> dict[str, list[float]]:
    """The seconds of a setting's subjects that were timed."""
    return {name: each["seconds"] for name, each in row["subjects"].items() if "why" not in each}


def speed(measured: Row) -> str:
    """Milliseconds of each subject, and its share of the rate of matrix products."""
    names = subjects(measured)
    lines = []
    for row in measured["settings"].values():
        rates = measured["made"]["product_flops"] / np.array(row["product_seconds"])
        floor = row["flops"] / float(np.median(rates))
        line = [row["setting"]["title"], f"{row['flops'] / 1e9:.3g}", milliseconds(floor)]
        again = [f"the same, {EPISODES} episodes", "", ""]
        for name in names:
            seconds = np.array(timed(row).get(name, []))
            if not seconds.size:
                line.append("not timed")
                again.append("")
                continue
            middle = float(np.median(seconds))
            share = float(np.median(row["flops"] / seconds / rates))
            line.append(f"{milliseconds(middle)} ({share:.0%})")
            again.append(milliseconds(middle * EPISODES / row["setting"]["tasks"]))
        lines.append(line)
        if row["setting"]["kind"] == "evaluation":
            lines.append(again)
    return table(["setting", "GFLOP", "floor", *names], lines)


def ratios(measured: Row) -> str:
    """How many times as long as the fast engine each takes, with 95% intervals."""
    others = [name for name in subjects(measured) if name != OURS]
    lines = []
    for row in measured["settings"].values():
        seconds = timed(row)
        line = [row["setting"]["title"]]
        found = {
            name: paired_ratio(seconds[name], seconds[OURS])
            for name in others
            if {name, OURS} <= seconds.keys()
        }
        for name in others:
            ratio = found.get(name)
            line.append(
                f"{ratio.estimate:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
                if ratio
                else "not timed"
            )
        peers = {name: ratio.estimate for name, ratio in found.items() if name not in ENGINES}
        best = min(peers, key=lambda name: peers[name], default=None)
        line.append(f"{best}, {peers[best]:.2f}" if best else "none")
        lines.append(line)
    return table(["setting", *others, "best peer"], lines)


def memory(measured: Row) -> str:
    """Peaks of a step in MiB, and what stays from one step to the next."""
    names = subjects(measured)
    lines = []
    for row in measured["settings"].values():
        line = [row["setting"]["title"]]
        for name in names:
            each = row["subjects"].get(name, {})
            parts = [each.get("peak_bytes"), each.get("held_bytes")]
            known = [f"{part / MIB:.0f}" for part in parts if part is not None]
            line.append(" + ".join(known) or "not measured")
        lines.append(line)
    return table(["setting", *names], lines)


def agreement(measured: Row) -> str:
    """Each subject's worst errors over the settings, and its longest preparation."""
    lines = []
    for name in subjects(measured):
        rows = [row["subjects"][name] for row in measured["settings"].values()]
        packages = measured["made"]["packages"]
        version = packages.get(name, f"torch {packages['torch']}")
        line = [name, version]
        for what in ("error_float64", "error_float32"):
            errors = [row[what] for row in rows if what in row]
            line.append(f"{max(errors):.0e}" if errors else "")
        prepared = [row["prepare_seconds"] for row in rows if "prepare_seconds" in row]
        line.append(f"{max(prepared):.1f}" if prepared else "")
        line.append("; ".join(dict.fromkeys(row["why"] for row in rows if "why" in row)))
        lines.append(line)
    head = ["", "version", "float64", "float32", "seconds to prepare", "not timed because"]
    return table(head, lines)


def grown(measured: Row) -> dict[tuple[str, str], dict[int, float]]:
    """Median seconds by size, for each axis and engine."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in measured["growth"]:
        line = found.setdefault((row["axis"], row["engine"]), {})
        line[row["value"]] = float(np.median(row["seconds"]))
    return found


def growth(measured: Row) -> str:
    """The figure, the slopes, and the times at the ends."""
    lines = []
    for (axis, engine), times in grown(measured).items():
        (first, least), *_, (last, most) = times.items()
        exponent = slope(list(times), list(times.values()))
        verdict = "no" if exponent.low <= 1 else "yes"
        sizes = f"{first} to {last}"
        ends = f"{milliseconds(least)} to {milliseconds(most)}"
        lines.append([axis, engine, sizes, ends, str(exponent), verdict])
    head = ["", "engine", "from", "ms", "slope [95%]", "shown worse than linear"]
    words = "Time of a meta-step over tasks, inner steps, shots and ways"
    return f"![{words}]({FIGURE.name})\n\n{table(head, lines)}" if lines else ""


def drawn(measured: Row) -> Figure:
    """Step time over tasks, steps, shots and ways, on logarithmic axes."""
    sns.set_theme(style="whitegrid", font_scale=0.9, rc=THIN)
    lines = grown(measured)
    axes_names = list(dict.fromkeys(axis for axis, _ in lines))
    figure = Figure(figsize=(3.0 * len(axes_names), 3.2), layout="constrained")
    panels = figure.subplots(1, len(axes_names), sharey=True, squeeze=False)[0]
    for panel, axis in zip(panels, axes_names, strict=True):
        for index, engine in enumerate(ENGINES):
            times = lines[axis, engine]
            milli = [1e3 * value for value in times.values()]
            exponent = slope(list(times), milli).estimate
            style = {"color": PALETTE[index], "marker": MARKERS[index], "markersize": 5}
            panel.plot(list(times), milli, **style, label=f"{engine}: slope {exponent:.2f}")
            ends = np.array([min(times), max(times)])
            guide = milli[0] * ends / ends[0]
            panel.plot(ends, guide, color="0.5", linestyle=":", linewidth=1, zorder=0)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(list(times), [str(value) for value in times])
        panel.set_xlabel({"steps": "inner steps"}.get(axis, axis))
        panel.legend(loc="upper left", fontsize="small", frameon=False)
    panels[0].set_ylabel("time of a meta-step, ms")
    figure.supxlabel("dotted: in proportion", fontsize="small")
    return figure


def machine(measured: Row) -> str:
    """What it was measured on."""
    made = measured["made"]
    rates = [
        made["product_flops"] / seconds / 1e9
        for row in measured["settings"].values()
        for seconds in row["product_seconds"]
    ]
    low, middle, high = np.percentile(rates, (5, 50, 95))
    rounds = [len(row["product_seconds"]) for row in measured["settings"].values()]
    return (
        f"Measured on {made['cpu']}, {made['threads']} thread(s) each, at commit "
        f"`{made['commit'][:12]}`, with torch {made['packages']['torch']} ({made['blas']}) and "
        f"Python {made['python']}; {min(rounds)} to {max(rounds)} rounds a setting. Matrix "
        f"products ran at {middle:.0f} GFLOP/s (5th to 95th percentile of the rounds {low:.0f} to "
        f"{high:.0f}).{later(measured)}\n"
    )


def later(measured: Row) -> str:
    """Which settings were measured again by themselves, and at what commit."""
    found: dict[str, list[str]] = {}
    for row in measured["settings"].values():
        if "commit" in row:
            found.setdefault(row["commit"], []).append(row["setting"]["title"])
    return "".join(
        f" Measured again by itself at commit `{commit[:12]}`: {'; '.join(titles)}."
        for commit, titles in found.items()
    )


def joined(kept: Row, new: Row) -> Row:
    """What was kept, with what was measured again in its place.

    Raises:
        ValueError: it was measured on another machine or with other packages.
    """
    if kept["settings"].keys() <= new["settings"].keys() and new["growth"]:
        return new
    commits = {"commit": None}
    if kept["made"] | commits != new["made"] | commits:
        raise ValueError("a part of the settings, from another machine than the rest")
    again = {name: row | {"commit": new["made"]["commit"]} for name, row in new["settings"].items()}
    return kept | {
        "settings": kept["settings"] | again,
        "growth": new["growth"] or kept["growth"],
    }


BLOCKS = {
    "machine": machine,
    "speed": speed,
    "ratios": ratios,
    "memory": memory,
    "agreement": agreement,
    "growth": growth,
}


def updated(text: str, measured: Row | None) -> str:
    """The page with its tables as the measurements have them, empty where there are none."""
    for name, block in BLOCKS.items():
        text = filled(text, name, block(measured) if measured else "")
    return text


def main(arguments: Sequence[str]) -> int:
    """Keep the file that is named, if one is, and write the page; the exit status."""
    source = Path(arguments[0]) if arguments else MEASURED
    try:
        measured = json.loads(MEASURED.read_text(encoding="utf-8"))
        if arguments:
            measured = joined(measured, json.loads(source.read_text(encoding="utf-8")))
        page = updated(PAGE.read_text(encoding="utf-8"), measured)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{source} is no measurement: {type(error).__name__} {error}", file=sys.stderr)
        return 2
    write_text(MEASURED, json.dumps(measured, indent=1) + "\n")
    write_text(PAGE, page)
    if measured["growth"]:
        with whole(FIGURE) as aside:
            drawn(measured).savefig(aside, format="png", dpi=150, bbox_inches="tight")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
