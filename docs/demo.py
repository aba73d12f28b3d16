"""Bring the README's table, sentences and pictures up to date from a run of ``make demo``.

    make demo
    .venv/bin/python docs/demo.py results/demo

It needs what the tests of the report need: Playwright, and a Chromium (BENCH_CHROMIUM names it
where it is neither ``chromium`` nor ``google-chrome``).
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright
from rich.console import Console

from bench import comparison, report
from bench.files import filled
from bench.plots import draw_all
from bench.store import Run
from bench.summary import summary_table

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
WIDTH = 96
"""Columns of the table, so that it fits the page."""


def table(folder: Path) -> str:
    """What ``run`` prints at its end."""
    printed = io.StringIO()
    Console(file=printed, width=WIDTH).print(summary_table(Run(folder).summary()))
    return "\n".join(line.rstrip() for line in printed.getvalue().strip("\n").splitlines())


def sentences(folder: Path) -> str:
    """What ``compare`` says first of each kind: better, better though unlike, no difference."""
    rows = comparison.compare([folder]).rows
    kinds = {(bool(row.better), bool(row.unlike)): row.sentence() for row in reversed(rows)}
    return "\n".join(kinds[kind] for kind in sorted(kinds, reverse=True))


def picture(page: Path, target: Path) -> None:
    """The top of a report, as a browser shows it."""
    named = os.environ.get("BENCH_CHROMIUM", "")
    found = [shutil.which(name) for name in (named, "chromium", "google-chrome") if name]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=next(filter(None, found)), args=["--no-sandbox"]
        )
        view = browser.new_page(viewport={"width": 1200, "height": 1500})
        view.goto(page.resolve().as_uri())
        view.wait_for_selector("html[data-ready]", timeout=300_000)
        view.screenshot(path=target)
        browser.close()


def main(folder: Path) -> None:
    """Make all of it from one run's folder."""
    text = README.read_text(encoding="utf-8")
    for name, block in (("demo", table(folder)), ("sentences", sentences(folder))):
        text = filled(text, name, f"```\n{block}\n```\n")
    README.write_text(text, encoding="utf-8")
    run = Run(folder)
    drawn, *_ = draw_all(run.summary(), run.figures)
    shutil.copyfile(drawn, ROOT / "docs" / "demo.png")
    page, *_ = report.write(folder)
    picture(page, ROOT / "docs" / "report.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
