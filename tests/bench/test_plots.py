"""Figures show what the summary says, and name what their intervals speak of."""

from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from bench import plots

ROWS = pd.DataFrame(
    [
        (algorithm, "glyphs", 5, shots, seed, "accuracy", mean + 0.01 * seed, 0.02, "complete")
        for algorithm, mean in (("maml", 0.8), ("anil", 0.7))
        for shots in (1, 5)
        for seed in (0, 1, 2)
    ],
    columns=["algorithm", "dataset", "ways", "shots", "seed", "metric", "mean", "ci95", "status"],
)


def test_one_seed_gives_the_interval_over_episodes() -> None:
    found, meaning = plots.intervals(ROWS[ROWS["seed"] == 0])
    assert "over test episodes" in meaning
    assert found["ci95"].tolist() == [0.02] * 4


def test_several_seeds_give_students_interval_over_them() -> None:
    found, meaning = plots.intervals(ROWS)
    assert meaning == "over 3 seeds"
    maml = found[(found["algorithm"] == "maml") & (found["shots"] == 1)].iloc[0]
    assert maml["mean"] == pytest.approx(0.81)
    assert maml["ci95"] == pytest.approx(4.302653 * 0.01 / 3**0.5, rel=1e-5)


def test_every_algorithm_and_shot_is_drawn_at_its_mean() -> None:
    figure = plots.accuracy(ROWS[ROWS["seed"] == 0])
    (axis,) = figure.axes
    heights = sorted(y for c in axis.containers for y in c.lines[0].get_ydata())
    assert heights == pytest.approx([0.7, 0.7, 0.8, 0.8])
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "5"]


def test_figures_are_written_as_png_and_svg(tmp_path: Path) -> None:
    paths = plots.draw_all(ROWS, tmp_path)
    assert [path.name for path in paths] == ["accuracy.png", "accuracy.svg"]
    with Image.open(paths[0]) as image:
        assert image.size[0] > 600
        assert len(image.convert("L").getcolors(256) or []) > 10


def test_a_run_without_results_draws_nothing(tmp_path: Path) -> None:
    assert plots.draw_all(ROWS.assign(status="failed"), tmp_path) == []
    assert list(tmp_path.iterdir()) == []
