"""The sinusoid figures of Finn et al. 2017: adapting to a wave, and the error after each step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import seaborn as sns
import torch
from matplotlib.figure import Figure

from algorithms.inner_loop import Tasks
from bench.checkpoints import read_tensors
from bench.plots import LINES, MARKERS, PALETTE, THIN, save
from bench.stats import mean_interval
from bench.store import CHECKPOINT, Record, Run
from bench.sweep import Cell
from bench.training import build
from datasets.sinusoid import INPUTS, SinusoidSource

SHOWN = {0: ":", 1: "--", 10: "-"}
"""Inner steps after which a prediction is drawn, and its line."""
POINTS = 201
WAVES = (0, 1)
"""Test episodes that are drawn."""

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """One network adapting to one wave.

    Attributes:
        x: where the wave is drawn, ``(points,)``.
        target: the wave there, ``(points,)``.
        support: x and y of the support points, ``(2, shots)``.
        predictions: the network there after each number of steps of :data:`SHOWN`.
    """

    x: Values
    target: Values
    support: Values
    predictions: dict[int, Values]


def fit(run: Run, record: Record, episode: int) -> Fit:
    """Adapt a cell's trained network to one of its test episodes, which it takes from x alone."""
    cell, source = record.cell, SinusoidSource()
    cpu = cell.model_copy(update={"device": "cpu"})
    algorithm = build(cpu, source)
    path = run.cells / cell.id / CHECKPOINT
    algorithm.load_state_dict(read_tensors(path, cell=cell.id, source=record.source))
    amplitude, phase, _ = source.waves(cell.test_spec, [episode])
    x = np.linspace(*INPUTS, POINTS)
    target = (amplitude * np.sin(x - phase))[0]
    support = source.batch(cell.test_spec, [episode])["train"]
    grid = (torch.from_numpy(v)[None, :, None].to(torch.float32) for v in (x, target))
    tasks = Tasks.of({"train": support, "test": tuple(grid)}, like=support[0])
    loop = algorithm.inner_loop
    loop.prepare(tasks)
    loop.train(False)
    predictions = {}
    for step, fast in enumerate(loop.trajectory(tasks, max(SHOWN), create_graph=False)):
        if step in SHOWN:
            with torch.no_grad():
                predictions[step] = loop.query(fast, tasks)[0, :, 0].double().numpy()
    points = np.stack([half[0, :, 0].double().numpy() for half in support])
    return Fit(x, target, points, predictions)


def draw(cells: Mapping[str, list[Cell]], folder: Path) -> list[Path]:
    """Draw both figures of a finished recipe; the paths of what was drawn.

    Args:
        cells: those of the recipe under ``""``, and of its baselines by name.
        folder: the recipe's run; the baselines are in folders of it.
    """
    runs = {name or cells[""][0].algorithm: Run(folder / name) for name in cells}
    records = {
        name: (run, [record for cell in mine if (record := run.record(cell.id))])
        for (name, run), mine in zip(runs.items(), cells.values(), strict=True)
    }
    records = {name: (run, found) for name, (run, found) in records.items() if found}
    on_x = {n: (run, found[0]) for n, (run, found) in records.items() if n != "oracle"}
    drawn = {"errors": errors(records), "fits": fits(on_x)}
    return [path for name, each in drawn.items() for path in save(each, folder / "figures" / name)]


def fits(records: Mapping[str, tuple[Run, Record]]) -> Figure:
    """Target, support points and predictions of each network for a few test waves."""
    sns.set_theme(style="whitegrid", font_scale=0.9, rc=THIN)
    figure = Figure(figsize=(1.6 + 3.2 * len(records), 2.6 * len(WAVES)), layout="constrained")
    axes = figure.subplots(len(WAVES), len(records), squeeze=False, sharex=True, sharey="row")
    for column, (name, (run, record)) in enumerate(records.items()):
        axes[0, column].set_title(f"{name}, alpha {record.cell.hyperparameters['inner_lr']:g}")
        for row, episode in enumerate(WAVES):
            axis, shown = axes[row, column], fit(run, record, episode)
            axis.plot(shown.x, shown.target, color=PALETTE[1], linewidth=2.5, label="target")
            for step, prediction in shown.predictions.items():
                axis.plot(
                    shown.x,
                    prediction,
                    color=PALETTE[2],
                    linestyle=SHOWN[step],
                    label="before" if step == 0 else f"after {step} step{'s' * (step > 1)}",
                )
            axis.plot(*shown.support, "^", color=PALETTE[3], label="support points")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    shown_waves = " and ".join(map(str, WAVES))
    figure.supxlabel(f"x; seed {record.cell.seed}, test episodes {shown_waves}", fontsize="small")
    return figure


def errors(records: Mapping[str, tuple[Run, list[Record]]]) -> Figure:
    """Mean squared error after 0, 1, ... steps, of each network."""
    sns.set_theme(style="whitegrid", font_scale=0.9, rc=THIN)
    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    axis = figure.subplots()
    seeds = set()
    for index, (name, (run, found)) in enumerate(records.items()):
        seeds.add(len(found))
        mean, low, high = error_by_step([run.scores_by_step(record.cell) for record in found])
        steps = np.arange(len(mean))
        style = {"color": PALETTE[index], "marker": MARKERS[index], "linestyle": LINES[index]}
        if len(mean) == 1:  # it does not adapt
            axis.axhline(mean[0], label=name, color=PALETTE[index], linestyle=LINES[index])
            continue
        axis.plot(steps, mean, label=name, **style)
        axis.fill_between(steps, low, high, color=PALETTE[index], alpha=0.15, linewidth=0)
    means = [value for line in axis.lines for value in np.atleast_1d(line.get_ydata())]
    if max(means) > 1000 * np.median(means):  # a wave on which further steps diverged
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
    axis.set_xlabel("gradient steps on the support points")
    axis.set_ylabel("mean squared error")
    axis.legend(frameon=False)
    over = f"{max(seeds)} seeds" if min(seeds) > 1 else "test episodes (one trained model)"
    figure.supxlabel(f"bands: 95% intervals over {over}", fontsize="small")
    return figure


def error_by_step(scores: list[Values]) -> tuple[Values, Values, Values]:
    """Mean, low and high ``(steps + 1,)`` of scores ``(episodes, steps + 1)``, one a seed: over
    seeds where there are two or more, else over episodes."""
    values = np.stack([each.mean(axis=0) for each in scores]) if len(scores) > 1 else scores[0]
    found = [mean_interval(column) for column in values.T]
    mean, low, high = np.array([(i.estimate, i.low, i.high) for i in found]).T
    return mean, low, high
