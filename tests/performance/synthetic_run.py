"""A run's folder of thousands of cells whose figures are SYNTHETIC, drawn from a generator.

    python -m tests.performance.synthetic_run FOLDER --cells 5000 --shape wide

The files are real: the store writes them, in the formats and with the columns of a real run, so
that what reads a run can be timed on one that would take a weekend to make. Nothing was trained; no
figure in such a folder says anything about an algorithm. (A checkpoint is one small tensor.)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from bench import measure, stats
from bench.checkpoints import write_tensors
from bench.measure import CALIBRATION, EVALUATION, GROWTH, GROWTH_STEPS, REPEATS, STEP
from bench.protocol import after_last_step
from bench.runner import side_by_side
from bench.store import CHECKPOINT, PERFORMANCE, SCORES, TRAINING, Run, source_hash
from bench.sweep import Cell, Sweep, stream_seed
from bench.training import validation_interval

WIDE = Sweep(
    algos="maml,fomaml,reptile,anil,boil,meta_sgd,maml_pp,cavia,imaml,protonet",
    ways="2,5,10,20",
    shots="1,2,3,5,10",
    seeds=",".join(map(str, range(25))),
    devices="cpu",
)
"""Many algorithms, settings and seeds: 10 x 20 x 25."""
SWEPT = Sweep(
    algos="maml,fomaml,anil,boil",
    shots="1,2,3,5,10",
    seeds=",".join(map(str, range(10))),
    devices="cpu",
    set={"inner_lr": "0.05,0.1,0.2,0.4,0.8", "inner_steps": "1,2,3,4,5"},
)
"""Hyperparameters swept: 100 entries a task, so 4,950 pairs in each of 5 tasks."""
SHAPES = {"wide": WIDE, "swept": SWEPT}


def scores(cell: Cell) -> pd.DataFrame:
    """Accuracies with what real ones have: hard and easy episodes, that all algorithms share, a
    part of the seed, and noise of the queries."""
    shared = np.random.default_rng(stream_seed("synthetic episodes", cell.ways, cell.shots))
    own = np.random.default_rng(stream_seed(cell.id))
    level = np.log1p(cell.shots) / 4 + 0.3 * np.tanh(stream_seed(cell.seedless_id) / 2**62 - 1)
    queries = cell.ways * cell.test_shots
    steps = np.arange(cell.eval_steps + 1) / max(cell.eval_steps, 1)
    logit = level + shared.normal(0, 0.5, (cell.episodes, 1)) + own.normal(0, 0.1) + steps - 1
    accuracy = own.binomial(queries, 1 / (1 + np.exp(-2 * logit))) / queries
    episode, step = np.indices(accuracy.shape)
    return pd.DataFrame(
        {
            "episode": episode.ravel(),
            "step": step.ravel(),
            "loss": -np.log(np.clip(accuracy, 0.01, None)).ravel(),
            "metric": accuracy.ravel(),
        }
    )


def training(cell: Cell) -> pd.DataFrame:
    """A falling loss, with validations where a training has them."""
    own = np.random.default_rng(stream_seed(f"{cell.id} training"))
    iteration = np.arange(1, cell.iterations + 1)
    progress = 1 - np.exp(-3 * iteration / cell.iterations)
    metric = np.clip(0.2 + 0.5 * progress + own.normal(0, 0.05, cell.iterations), 0, 1)
    validated = (iteration % validation_interval(cell) == 0) | (iteration == cell.iterations)
    return pd.DataFrame(
        {
            "iteration": iteration,
            "loss": 1.6 - progress + own.normal(0, 0.05, cell.iterations),
            "metric": metric,
            "seconds": own.gamma(50, 0.06 / 50, cell.iterations),
            "val_metric": np.where(validated, metric, np.nan),
        }
    )


def performance(cell: Cell, session: str) -> pd.DataFrame:
    """Seconds, bytes and operations of the phases and repeats of a measurement."""
    own = np.random.default_rng(stream_seed(f"{cell.id} performance"))
    usual = {STEP: 0.06, CALIBRATION: 0.03, EVALUATION: 0.1}
    rows = [(GROWTH, 0, steps, 0.05 * steps, 1e6) for steps in GROWTH_STEPS]
    rows += [(p, r, np.nan, s, 1e9) for r in range(REPEATS) for p, s in usual.items()]
    frame = pd.DataFrame(rows, columns=["phase", "repeat", "inner_steps", "seconds", "flops"])
    frame["seconds"] *= own.gamma(100, 1 / 100, len(frame))
    frame["wall_seconds"] = frame["process_seconds"] = frame["seconds"]
    frame["peak_bytes"] = 40 * 2**20 + own.integers(0, 2**20, len(frame))
    return frame.assign(session=session)


def write_cell(run: Run, cell: Cell, source: str, session: str) -> None:
    """Write a cell as the runner does, in its workplace, and make it complete."""
    workplace = run.workplace(cell)
    episodes, log, costs = scores(cell), training(cell), performance(cell, session)
    interval = stats.mean_interval(after_last_step(episodes).to_numpy())
    episodes.to_parquet(workplace / SCORES, index=False)
    log.to_parquet(workplace / TRAINING, index=False)
    costs.to_parquet(workplace / PERFORMANCE, index=False)
    tensor = {"SYNTHETIC": torch.zeros(1)}
    write_tensors(tensor, workplace / CHECKPOINT, cell=cell.id, source=source)
    figures = {
        "metric": "accuracy",
        "mean": interval.estimate,
        "ci95": interval.half_width,
        "train_seconds": float(log["seconds"].sum()),
        "engine": "batched",
        "episode_address": cell.test_spec.address,
        "sample_reuse": 1.0,
    }
    run.complete(cell, source, figures | measure.headline(costs))


def write_run(folder: Path, sweep: Sweep, cells: list[Cell]) -> None:
    """Write a run of synthetic cells."""
    run = Run(folder)
    with run.start(sweep):
        (folder / "SYNTHETIC").write_text("No figure in this folder was measured.\n")
        source = source_hash(sweep.plugin)
        for number, group in enumerate(side_by_side(cells)):
            for cell in group:
                write_cell(run, cell, source, session=f"{number:08x}")
        run.write_summary()


def main() -> None:
    """Write a run as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cells", type=int, default=5000)
    parser.add_argument("--shape", choices=SHAPES, default="wide")
    asked = parser.parse_args()
    sweep = SHAPES[asked.shape]
    write_run(asked.folder, sweep, sweep.cells()[: asked.cells])


if __name__ == "__main__":
    main()
