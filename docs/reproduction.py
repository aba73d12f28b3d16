"""Write the tables of README.md and docs/reproduction.md from what results/reference/ holds.

Run it after ``python -m bench reproduce RECIPE --keep results/reference``.
"""

from __future__ import annotations

from pathlib import Path

from bench import reproduction
from bench.files import filled

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "reproduction.md")


def updated(text: str) -> str:
    """A page with its tables as the reference files have them."""
    kept = reproduction.references()
    text = filled(text, "reproduced", reproduction.markdown(kept))
    return filled(text, "learning", reproduction.learning_markdown(kept))


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(updated(page.read_text(encoding="utf-8")), encoding="utf-8")
