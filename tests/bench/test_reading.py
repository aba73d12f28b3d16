"""What stands in a results folder is held against what this program writes there."""

from pathlib import Path

import pytest

from bench.reading import NUMBERS, WORDS, figures_of
from bench.store import Run
from tests.bench.conftest import QUICK


def test_every_figure_that_a_cell_is_given_has_a_kind(bench, tmp_path: Path) -> None:
    asked = ("--algos", "maml", *QUICK, "--verify-gradients", "--out", "r")
    assert bench("run", *asked)[0] == 0
    (record,) = Run(tmp_path / "r").records()
    kinds = {name: type(value) for name, value in record.figures.items()}
    numbers = {name for name, kind in kinds.items() if kind in (int, float)}
    assert numbers <= NUMBERS
    assert kinds.keys() - numbers <= WORDS


@pytest.mark.parametrize("name", sorted(NUMBERS))
def test_a_word_in_the_place_of_a_number_is_found(name: str) -> None:
    assert figures_of({name: 0.5}) == {name: 0.5}
    with pytest.raises(ValueError, match=f"{name} is not a number"):
        figures_of({name: "fast"})


@pytest.mark.parametrize("name", sorted(WORDS - {"status", "cell_id", "source"}))
def test_a_number_in_the_place_of_a_word_is_found(name: str) -> None:
    assert figures_of({name: "x"}) == {name: "x"}
    with pytest.raises(ValueError, match="not a line of text"):
        figures_of({name: 0.5})
