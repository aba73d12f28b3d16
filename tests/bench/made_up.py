"""Cells with made-up results, for what reads them."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.store import CHECKPOINT, PERFORMANCE, SCORES, TRAINING, Run
from bench.sweep import Cell

LEVELS = {"maml": 0.80, "anil": 0.72, "reptile": 0.76}
EPISODES = 40


def cell_of(algorithm: str, seed: int = 0, **settings: Any) -> Cell:
    chosen = {
        **{"dataset": "glyphs", "ways": 5, "shots": 1, "device": "cpu", "train_shots": 1},
        **{"iterations": 80, "episodes": EPISODES, "eval_steps": 3},
        "hyperparameters": {"inner_steps": 1, "inner_lr": 0.4, "norm": "transductive"},
    }
    return Cell(algorithm=algorithm, seed=seed, **(chosen | settings))


def add(
    run: Run,
    cell: Cell,
    metric: str = "accuracy",
    level: float | None = None,
    source: str = "abc",
    **figures_too: Any,
) -> None:
    """Put a cell with made-up results in a run."""
    if level is None:
        level = LEVELS.get(cell.algorithm, 0.6)
    # All cells meet the same episodes, so part of what happens in one is the same for all.
    shared = np.random.default_rng(0).normal(0, 0.05, cell.episodes)
    own = np.random.default_rng([cell.seed, *cell.algorithm.encode()])
    steps = cell.eval_steps + 1
    rise = level * (1 - 0.5 * 0.3 ** np.arange(steps))
    scores = rise + shared[:, None] + own.normal(0, 0.02, (cell.episodes, steps))
    workplace = run.workplace(cell)
    pd.DataFrame(
        {
            "episode": np.repeat(np.arange(cell.episodes), steps),
            "step": np.tile(np.arange(steps), cell.episodes),
            "loss": 1 - scores.ravel(),
            "metric": scores.ravel(),
        }
    ).to_parquet(workplace / SCORES)
    iterations = np.arange(1, cell.iterations + 1)
    training = pd.DataFrame({"iteration": iterations, "loss": 1.0, "metric": level, "seconds": 0.1})
    validated = iterations % 20 == 0
    training["val_metric"] = np.where(validated, level * iterations / cell.iterations, np.nan)
    training.to_parquet(workplace / TRAINING)
    repeat = np.arange(7)
    cost = 0.01 * (1 + len(cell.algorithm)) * (1 + 0.01 * repeat)
    performance = {"phase": "meta_step", "repeat": repeat, "seconds": cost, "session": "s"}
    performance |= {"process_seconds": cost, "peak_bytes": 2**20 * len(cell.algorithm)}
    steps = pd.Series([1, 2, 4, 8])
    growth = {
        "phase": "growth",
        "repeat": 0,
        "seconds": 0.1,
        "inner_steps": steps,
        "peak_bytes": 2**20 * (5 + cell.seed + steps),
    }
    measured = pd.concat([pd.DataFrame(growth), pd.DataFrame(performance)])
    measured.to_parquet(workplace / PERFORMANCE, index=False)
    (workplace / CHECKPOINT).write_bytes(b"weights")
    last = scores[:, -1]
    figures = {
        **{"metric": metric, "mean": last.mean(), "ci95": 2 * last.std() / len(last) ** 0.5},
        **{"train_seconds": 8.0, "step_ms": 1e3 * cost[3], "eval_ms_per_episode": 2.0},
        **{"peak_memory_bytes": 2**20 * len(cell.algorithm), "step_gflops": 0.1},
        "episode_address": f"{cell.dataset}/{cell.ways}/{cell.shots}/{cell.test_shots}",
    }
    run.complete(cell, source, figures | figures_too)


NASTY = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    '"><img src=x onerror=alert(3)>',
    "<!--<script>",
    "{{ 7 * 7 }}",
    "$\\frac{$",
    "[red]x[/nothing]",
    "[3cm]",
    "|a|`b`@everyone",
    "\\input{/etc/passwd}%",
)
"""Names that are more than names to somebody who reads a document."""


def nasty(folder: Path) -> Run:
    """A run in which algorithms, a dataset and the values of a hyperparameter have such names."""
    run = Run(folder)
    run.cells.mkdir(parents=True)
    for name in NASTY:
        add(run, cell_of(name, episodes=20, dataset=NASTY[2]))
        add(run, cell_of("maml", episodes=20, hyperparameters={"norm": name}))
    return run
