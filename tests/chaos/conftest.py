"""Two forms of one set of tests: a few faults of each kind, or with ``--whole`` all of them; and
what they counted, printed at the end (``make chaos``)."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.files import filled
from tests.chaos.attempts import Attempt, contents, quick, sweep

COUNTS = pytest.StashKey[dict[str, Counter[str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="all faults, not a few of each kind")
    parser.addoption("--counts-to", type=Path, help="a page whose table of faults is to be filled")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[COUNTS] = {}


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    counts = config.stash[COUNTS]
    if not counts:
        return
    rows = [
        f"| {fault} | {', '.join(f'{count:,} {what}' for what, count in counted.items())} |"
        for fault, counted in counts.items()
    ]
    table = "\n".join(["| fault | counts |", "| --- | --- |", *rows, ""])
    terminalreporter.write_line(table)
    page = config.getoption("counts_to", default=None)
    if page is not None and exitstatus == 0:
        page.write_text(filled(page.read_text(encoding="utf-8"), "faults", table), encoding="utf-8")


@pytest.fixture
def whole(request: pytest.FixtureRequest) -> bool:
    """Whether all faults are asked for."""
    return bool(request.config.getoption("whole", default=False))


@pytest.fixture
def counted(request: pytest.FixtureRequest) -> Counter[str]:
    """What the test counts, under the first line of its docstring."""
    name = request.function.__doc__.splitlines()[0].rstrip(".")
    return request.config.stash.setdefault(COUNTS, {}).setdefault(name, Counter())


ONE = ("--algos", "maml", "--iterations", "3")
"""The cell that most faults are tried on."""


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What :data:`ONE` comes to when nothing happens to it."""
    place = tmp_path_factory.mktemp("undisturbed") / "here"
    place.mkdir()
    assert Attempt(sweep("r", *ONE), place, quick).status() == 0
    return contents(place / "r")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder to run commands in."""
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own to run commands in."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a disk, and not everywhere")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
