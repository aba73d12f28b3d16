"""Write the tables of README.md and docs/reproduction.md from what results/reference/ holds.

Run it after ``python -m bench reproduce RECIPE --keep results/reference``.
"""

from __future__ import annotations

import re
from pathlib import Path

from bench import reproduction

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "reproduction.md")


def filled(text: str, name: str, table: str) -> str:
    """A text with a table between the markers of that name; as it was where it has none."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    between = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    return between.sub(lambda found: begin + table + end, text)


def updated(text: str) -> str:
    """A page with its tables as the reference files have them."""
    kept = reproduction.references()
    text = filled(text, "reproduced", reproduction.markdown(kept))
    return filled(text, "learning", reproduction.learning_markdown(kept))


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(updated(page.read_text(encoding="utf-8")), encoding="utf-8")
