"""Every input that was once a fault is none now, and sound ones are read; ``make fuzz`` looks for
more faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS, tried

FOUND = [path for path in Path(__file__).with_name("found").glob("*/*") if path.is_file()]


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_an_input_that_was_a_fault_is_none_now(path: Path, tmp_path: Path) -> None:
    tried(TARGETS[path.parent.name], path.read_bytes(), tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_the_fuzzer_starts_from_inputs_that_can_be_read(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    read = [tried(target, seed, tmp_path) for seed in target.seeds()]
    assert any(read)
