"""A long training on a tiny task: does anything grow?

    python -m tests.performance.soak --engine batched --iterations 20000

It is the training of `bench run` (validations and checkpoints with it) on the sinusoid. Resident
memory, open files and threads are noted as it goes; printed is how fast each grows, with its 95%
interval, over the last 80% of the iterations, when imports and allocators have settled.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from scipy import stats

from bench.sweep import Sweep
from bench.training import Iteration, train
from datasets import get

SETTLED = 0.2
"""Share of the iterations after which growth is looked at."""
SAMPLES = 1000
BLOCKS = 6
LOG_BYTES = 3 * (24 + 8)
"""What a training keeps of an iteration, for `training.parquet`: three numbers, each an object and
a place in a list."""


def soak(engine: str, iterations: int, checkpoint: Path) -> pd.DataFrame:
    """Train, and note what the process holds: ``iteration``, ``rss`` (bytes), ``files``,
    ``threads``."""
    (cell,) = Sweep(
        algos="maml",
        datasets="sinusoid",
        shots="5",
        devices="cpu",
        set={
            **{"iterations": [iterations], "meta_batch": [2], "inner_steps": [1]},
            **{"engine": [engine], "val_every": [max(1, iterations // 20)], "val_episodes": [20]},
        },
    ).cells()
    process = psutil.Process()
    every = max(1, iterations // SAMPLES)
    rows = []

    def note(progress: Iteration) -> None:
        if progress.iteration % every == 0:
            held = process.memory_info().rss, process.num_fds(), process.num_threads()
            rows.append((progress.iteration, *held))

    splits = (get("sinusoid")().load(split) for split in ("train", "val"))
    train(cell, *splits, checkpoint, report=note)
    return pd.DataFrame(rows, columns=["iteration", "rss", "files", "threads"])


def slope(iteration: np.ndarray, value: np.ndarray) -> tuple[float, float, float]:
    """Growth an iteration, and its 95% interval.

    A level that stays for many samples makes neighbours alike, and an ordinary interval far too
    narrow. The line is that through the means of :data:`BLOCKS` stretches, which are nearly
    independent, with Student's t; where neighbours are alike over a twentieth of the run it covers
    93% of the time, and Newey and West's errors with a tenth of the samples as lags 81%.
    """
    x, y = ([part.mean() for part in np.array_split(v, BLOCKS)] for v in (iteration, value))
    line = stats.linregress(x, y)
    half = float(stats.t.ppf(0.975, BLOCKS - 2)) * line.stderr
    return line.slope, line.slope - half, line.slope + half


def main() -> None:
    """Soak as the command line asks, and print what grew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=["batched", "higher"], default="batched")
    parser.add_argument("--iterations", type=int, default=20_000)
    parser.add_argument("--save", type=Path, help="a CSV file for what was noted")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        held = soak(asked.engine, asked.iterations, Path(folder) / "training.safetensors")
    if asked.save:
        held.to_csv(asked.save, index=False)
    settled = held[held["iteration"] > SETTLED * asked.iterations]
    first, last = settled.iloc[0], settled.iloc[-1]
    print(
        f"{asked.engine}: {asked.iterations:,} iterations, {len(settled)} samples of the last 80%"
    )
    estimate, low, high = slope(settled["iteration"].to_numpy(), settled["rss"].to_numpy())
    print(
        f"  resident set {first['rss'] / 2**20:.1f} -> {last['rss'] / 2**20:.1f} MiB: "
        f"{estimate:+.0f} bytes an iteration [{low:+.0f}, {high:+.0f}], "
        f"of which the log of losses is {LOG_BYTES}"
    )
    for name in ("files", "threads"):
        print(
            f"  {name:<12} {settled[name].min()} to {settled[name].max()}, {last[name]} at the end"
        )


if __name__ == "__main__":
    main()
