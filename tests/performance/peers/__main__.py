"""``make bench-peers``: times this project's engines against other libraries doing the same work.

python -m tests.performance.peers --out FILE [--settings omniglot,growth] [--seconds 25]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench.files import write_text
from tests.performance.peers.comparison import ROOT, Comparison, SubjectError, subjects_here
from tests.performance.peers.work import SETTINGS

GROWTH = "growth"
PARTS = [*SETTINGS, GROWTH]


def main(arguments: list[str] | None = None) -> int:
    """Measure what is asked for and write it down; the exit status."""
    parser = argparse.ArgumentParser(prog="peers", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where the JSON file goes")
    parser.add_argument("--settings", default=",".join(PARTS), help="the default is all of them")
    parser.add_argument("--subjects", help="the default is all that are installed")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers", help="environment")
    parser.add_argument("--threads", type=int, default=2, help="of each subject")
    parser.add_argument("--seconds", type=float, default=25.0, help="of rounds, a setting")
    asked = parser.parse_args(arguments)
    here = subjects_here(asked.peers)
    parts = asked.settings.split(",")
    names = asked.subjects.split(",") if asked.subjects else here
    wrong = [
        f"no {what} is called {name!r}; there are {', '.join(known)}"
        for what, given, known in (("setting", parts, PARTS), ("subject", names, here))
        for name in given
        if name not in known
    ]
    if asked.threads < 1:
        wrong.append(f"threads is {asked.threads}; it must be at least 1")
    if not asked.out.parent.is_dir():
        wrong.append(f"{asked.out.parent} is not a folder")
    if wrong:
        print(wrong[0], file=sys.stderr)
        return 2
    comparison = Comparison(
        names, asked.peers, asked.threads, asked.seconds, lambda line: print(line, flush=True)
    )
    try:
        measured = comparison.run([p for p in parts if p != GROWTH], growth=GROWTH in parts)
    except SubjectError as error:
        print(error, file=sys.stderr)
        return 1
    write_text(asked.out, json.dumps(measured, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
