"""Does the regression check work? Regressions planted on purpose, and repeats that change nothing.

    python docs/regression/experiments.py [--repeats 20] [--out results/regression-experiments]

Trains MAML on the built-in data once as a baseline, again with its meta-steps a quarter slower,
again with 3 points of accuracy taken away, and then twenty times unchanged; holds each against the
baseline. Exit status 0 if both regressions are caught and no clean repeat is an alarm. Run it on an
idle machine: on a busy one the check says that it is too noisy to tell. A second start goes on
where the first stopped.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from bench.regression import Check, check

HERE = Path(__file__).resolve().parent
SWEEP = (
    *("--algos", "maml", "--datasets", "glyphs", "--seeds", "0,1,2", "--devices", "cpu"),
    *("--iterations", "10", "--episodes", "200"),
)


def train(folder: Path, plugin: Path | None = None) -> None:
    """Run the sweep, with a plug-in or without."""
    command = [sys.executable, "-m", "bench", "run", *SWEEP, "--out", str(folder)]
    if plugin is not None:
        command += ["--plugin", str(plugin)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def planted(console: Console, out: Path, what: str, plugin: str, quantities: set[str]) -> bool:
    """Hold a run with a planted regression against the baseline; whether it was caught."""
    train(out / plugin, HERE / f"{plugin}.py")
    found = check(out / plugin, out / "baseline")
    console.print(f"\n{what}: {found.conclusion}")
    console.print(found.table())
    return bool(quantities & {finding.quantity for finding in found.worse})


def clean(console: Console, out: Path, repeats: int) -> list[Check]:
    """Hold runs that changed nothing against the baseline."""
    console.print("\nclean repeats:")
    found = []
    for repeat in range(1, repeats + 1):
        train(out / f"clean-{repeat}")
        found.append(check(out / f"clean-{repeat}", out / "baseline"))
        console.print(f"  {repeat:2}: {found[-1].conclusion}")
    return found


def extremes(console: Console, repeats: list[Check]) -> None:
    """The changes that were measured where nothing had changed: the noise."""
    console.print("\nmeasured where nothing had changed:")
    for quantity in dict.fromkeys(f.quantity for found in repeats for f in found.findings):
        here = [f for found in repeats for f in found.findings if f.quantity == quantity]
        changes = [finding.change for finding in here]
        low, high, unit = min(changes), max(changes), here[0].unit
        console.print(f"  {quantity}: from {low:+.1f} to {high:+.1f} {unit}")


def main() -> int:
    """Run the experiments; 0 if all came out as they should."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("results/regression-experiments"))
    arguments = parser.parse_args()
    console = Console(width=100, highlight=False)
    train(arguments.out / "baseline")
    times = {f"meta-step {clock} time" for clock in ("wall", "CPU")}
    slow = planted(console, arguments.out, "planted: 25% slower", "planted_slowdown", times)
    loss = planted(console, arguments.out, "planted: 3 points lost", "planted_loss", {"accuracy"})
    repeats = clean(console, arguments.out, arguments.repeats)
    alarms = sum(found.regressed for found in repeats)
    extremes(console, repeats)
    console.print(
        f"\nslowdown {'caught' if slow else 'MISSED'}, loss {'caught' if loss else 'MISSED'}, "
        f"{alarms} false alarms in {len(repeats)} clean repeats"
    )
    return 0 if slow and loss and not alarms else 1


if __name__ == "__main__":
    sys.exit(main())
