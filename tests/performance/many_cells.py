"""What it takes to list, report, compare, check and resume a run of thousands of (synthetic) cells.

    python -m tests.performance.many_cells FOLDER --cells 5000 --shape wide

Processor seconds, which other work on the machine hardly changes, wall seconds, and the peak of the
resident set, of each command in a process of its own. FOLDER is made where it is not there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.performance.synthetic_run import SHAPES, write_run

COMMANDS = {
    "status": ["status", "{run}"],
    "compare": ["compare", "{run}"],
    "report": ["report", "{run}"],
    "check": ["check", "{run}", "--baseline", "{run}"],
    "resume": [
        *("run", "--config", "{run}/sweep.toml", "--out", "{run}", "--accept-changed-code"),
    ],
}


def main() -> None:
    """Time the commands that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cells", type=int, default=5000)
    parser.add_argument("--shape", choices=SHAPES, default="wide")
    parser.add_argument("--only", choices=COMMANDS, action="append")
    parser.add_argument("--checkout", type=Path, default=Path.cwd(), help="whose code is timed")
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    if not folder.exists():
        sweep = SHAPES[asked.shape]
        write_run(folder, sweep, sweep.cells()[: asked.cells])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(asked.checkout)}
    print("command   exit  CPU s  wall s  peak MiB", flush=True)
    for name in asked.only or COMMANDS:
        words = [word.format(run=folder) for word in COMMANDS[name]]
        began = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, "-m", "bench", *words],
            cwd=asked.checkout,
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        _, status, used = os.wait4(child.pid, 0)
        code, wall = os.waitstatus_to_exitcode(status), time.perf_counter() - began
        cpu, peak = used.ru_utime + used.ru_stime, used.ru_maxrss / 1024
        print(f"{name:<8} {code:>5} {cpu:>6.1f} {wall:>7.1f} {peak:>9.0f}", flush=True)


if __name__ == "__main__":
    main()
