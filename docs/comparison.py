"""Compare algorithms as docs/comparison/NAME.toml says, and keep what came of it.

``python docs/comparison.py NAME ...`` runs these sweeps (in results/NAME; what was stopped goes
on), compares every pair, and keeps the tables in results/comparison/NAME. Then
``python docs/reproduction.py`` writes them into the pages.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd

from bench import comparison, tables
from bench.environment import makers
from bench.files import write_text
from bench.measure import EPISODES, EVALUATION, STEP
from bench.store import PERFORMANCE, Run, to_json

ROOT = Path(__file__).resolve().parents[1]
SWEEPS = ROOT / "docs" / "comparison"
KEPT = ROOT / "results" / "comparison"


def processor_ms(run: Run) -> pd.DataFrame:
    """Processor time of each algorithm, which does not grow with what else a machine does: medians
    over repeats and seeds of a meta-step (``step_process_ms``) and of an evaluation episode
    (``eval_process_ms``)."""
    parts = []
    for record in run.records():
        measured = pd.read_parquet(run.cells / record.cell.id / PERFORMANCE)
        parts.append(measured.assign(algorithm=record.cell.algorithm))
    seconds = pd.concat(parts).groupby(["algorithm", "phase"])["process_seconds"].median().unstack()
    return pd.DataFrame(
        {
            "step_process_ms": 1e3 * seconds[STEP],
            "eval_process_ms": 1e3 * seconds[EVALUATION] / EPISODES,
        }
    )


def keep(run: Run, folder: Path) -> list[Path]:
    """Put a run's tables, and on what they were made, into a folder."""
    board = tables.read(run).leaderboard.merge(processor_ms(run).reset_index(), on="algorithm")
    files = {
        "leaderboard.csv": board.to_csv(index=False),
        "summary.csv": run.summary().to_csv(index=False),
        "comparison.csv": comparison.compare([run.folder]).table.to_csv(index=False),
        "environment.json": to_json(makers(record.figures for record in run.records())),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_text(folder / name, text)
    return [folder / name for name in files]


def main(names: list[str]) -> None:
    """Run, compare and keep the named sweeps."""
    known = sorted(path.stem for path in SWEEPS.glob("*.toml"))
    if not names or not set(names) <= set(known):
        sys.exit(f"name sweeps to compare; there are {', '.join(known)}")
    for name in names:
        run = Run(ROOT / "results" / name)
        asked = ["--config", str(SWEEPS / f"{name}.toml"), "--out", str(run.folder)]
        subprocess.run([sys.executable, "-m", "bench", "run", *asked], cwd=ROOT, check=True)
        for path in keep(run, KEPT / name):
            print(f"kept: {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
