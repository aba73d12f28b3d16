"""Figures show what the summary says, and name what their intervals speak of."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bench import plots, tables
from bench.store import Run
from tests.bench.made_up import add, cell_of
from tests.bench.test_report import LEVELS, sample, score_at, swept

ROWS = pd.DataFrame(
    [
        (algorithm, "glyphs", 5, shots, seed, "accuracy", mean + 0.01 * seed, 0.02, "complete")
        for algorithm, mean in (("maml", 0.8), ("anil", 0.7))
        for shots in (1, 5)
        for seed in (0, 1, 2)
    ],
    columns=["algorithm", "dataset", "ways", "shots", "seed", "metric", "mean", "ci95", "status"],
).assign(device="cpu")


def test_one_seed_gives_the_interval_over_episodes() -> None:
    found, meaning = plots.intervals(ROWS[ROWS["seed"] == 0])
    assert "over test episodes" in meaning
    assert found["ci95"].tolist() == [0.02] * 4


def test_several_seeds_give_students_interval_over_them() -> None:
    found, meaning = plots.intervals(ROWS)
    assert meaning == "over 3 seeds (the algorithm, trained again, on these test episodes)"
    maml = found[(found["algorithm"] == "maml") & (found["shots"] == 1)].iloc[0]
    assert maml["mean"] == pytest.approx(0.81)
    assert maml["ci95"] == pytest.approx(4.302653 * 0.01 / 3**0.5, rel=1e-5)


def test_devices_are_never_taken_for_seeds() -> None:
    both = pd.concat([ROWS, ROWS.assign(device="cuda:0", mean=0.4)])
    found, meaning = plots.intervals(both)
    assert "over 3 seeds" in meaning
    assert len(found) == 8
    figure = plots.accuracy(both)
    assert [axis.get_title() for axis in figure.axes] == [
        *("glyphs on cpu, 5-way", "glyphs on cuda:0, 5-way")
    ]


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


def test_rows_that_differ_in_a_swept_setting_are_drawn_each_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(plots, "accuracy", lambda summary: drawn.append(summary) or plots.Figure())
    swept = pd.concat([ROWS.assign(inner_lr=0.1), ROWS.assign(inner_lr=0.2, mean=0.5)])
    plots.draw_all(swept, tmp_path, ["inner_lr"])
    means = plots.intervals(drawn[0])[0].groupby("algorithm")["mean"].first()
    assert means["maml (inner_lr 0.2)"] == 0.5
    assert means["maml (inner_lr 0.1)"] == pytest.approx(0.81)


def test_a_run_without_results_draws_nothing(tmp_path: Path) -> None:
    assert plots.draw_all(ROWS.assign(status="failed"), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tables.Tables:
    return tables.read(sample(tmp_path_factory.mktemp("plots") / "run"))


def test_a_reports_figures_have_a_panel_a_task_and_say_what_their_intervals_are(found) -> None:
    board = found.leaderboard
    figures = {
        "over episodes": plots.adaptation(board, found.adaptation),
        "lowest to highest seed": plots.learning(board, found.learning, "seconds"),
        "over 2 seeds": plots.cost(board, "step_ms", "over 2 seeds"),
    }
    for meaning, figure in figures.items():
        assert len(figure.axes) == 3
        assert meaning in figure.get_supxlabel()
        assert "5-way 1-shot" in figure.axes[0].get_title()
        assert figure.axes[2].get_ylabel() == "mean squared error"


def test_adaptation_is_drawn_at_its_means_in_per_cent(found) -> None:
    axis = plots.adaptation(found.leaderboard, found.adaptation).axes[0]
    first = found.adaptation[found.adaptation["entry"] == 0]
    assert axis.lines[0].get_xdata().tolist() == [0, 1, 2, 3]
    assert axis.lines[0].get_ydata() == pytest.approx(100 * first["mean"].to_numpy())


def test_learning_is_drawn_of_validation_where_there_is_any(found) -> None:
    for of in ("validation", "training"):
        points = found.learning
        if of == "training":
            points = points[points["of"] == of]
        axis = plots.learning(found.leaderboard, points, "iteration").axes[0]
        mine = points[(points["entry"] == 0) & (points["of"] == of)]
        assert axis.lines[0].get_ydata() == pytest.approx(100 * mine["mean"].to_numpy())


def test_the_sensitivity_is_drawn_over_the_values_that_were_swept(tmp_path: Path) -> None:
    run = swept(tmp_path / "run")
    found = tables.read(run)
    points = found.sensitivity.set_index(["axis", "line", "value"])["mean"].sort_index()
    assert points.loc["inner_lr", "maml (norm single)"].to_dict() == pytest.approx(
        {value: score_at(run, inner_lr=value, norm="single") for value in (0.01, 0.1, 1.0)}
    )
    assert set(points.loc["norm"].index.get_level_values("line")) == {
        f"{algorithm} (inner_lr {value})" for algorithm in LEVELS for value in (0.01, 0.1, 1.0)
    }
    figure = plots.sensitivity(found.leaderboard, found.sensitivity, "over 2 seeds")
    by_title = {axis.get_xlabel(): axis for axis in figure.axes}
    rates, norms = by_title["inner lr"], by_title["norm"]
    assert (rates.get_xscale(), norms.get_xscale()) == ("log", "linear")
    assert [label.get_text() for label in rates.get_xticklabels()] == ["0.01", "0.1", "1"]
    assert [label.get_text() for label in norms.get_xticklabels()] == ["single", "support"]
    drawn = {tuple(container.lines[0].get_ydata()) for container in rates.containers}
    assert tuple(100 * points.loc["inner_lr", "maml (norm single)"]) in drawn
    bars = [
        segment[:, 1]
        for container in rates.containers
        for segment in container.lines[2][0].get_segments()
    ]
    ends = 100 * found.sensitivity.query("axis == 'inner_lr'")[["low", "high"]].to_numpy()
    assert len(bars) == 3 * len(rates.containers)
    assert all(np.isclose(bar, ends).all(axis=1).any() for bar in bars)
    assert "over 2 seeds" in figure.get_supxlabel()


def test_what_was_swept_in_no_run_is_not_drawn(found) -> None:
    assert found.sensitivity.empty


def test_entries_are_told_apart_without_colour(found) -> None:
    axis = plots.adaptation(found.leaderboard, found.adaptation).axes[0]
    looks = {(line.get_marker(), str(line.get_linestyle())) for line in axis.lines}
    assert len(looks) == len(axis.lines) == 3


def test_the_palette_stands_out_from_white_and_from_black() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in plots.PALETTE:
        assert 1.05 / (luminance(colour) + 0.05) > 3
        assert (luminance(colour) + 0.05) / 0.05 > 3


def test_a_reports_figures_of_nothing_are_none(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.cells.mkdir(parents=True)
    assert plots.draw_tables(tables.read(run), run.figures) == []


def test_a_run_draws_its_algorithms_in_the_order_of_its_report() -> None:
    rows = ROWS.assign(mean=ROWS["mean"].where(ROWS["algorithm"] == "maml", 0.99))
    _, labels = plots.accuracy(rows).axes[0].get_legend_handles_labels()
    assert labels[0] != "maml"
    assert set(labels) == set(rows["algorithm"])
    _, labels = plots.accuracy(rows.assign(metric="mse")).axes[0].get_legend_handles_labels()
    assert labels[0] == "maml"


def test_every_seed_counts_also_where_another_algorithm_has_but_one() -> None:
    rows = ROWS[(ROWS["algorithm"] == "maml") | (ROWS["seed"] == 0)]
    found, meaning = plots.intervals(rows)
    means = found[found["shots"] == 1].set_index("algorithm")
    assert means.loc["maml", "mean"] == pytest.approx(0.81)
    assert means.loc["maml", "ci95"] == pytest.approx(4.302653 * 0.01 / 3**0.5, rel=1e-5)
    assert means.loc["anil", ["mean", "ci95"]].tolist() == pytest.approx([0.7, 0.02])
    assert meaning == "over 3 seeds, or over episodes for one seed"


def test_cells_of_different_source_are_drawn_each_for_themselves(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.cells.mkdir(parents=True)
    for seed, source in enumerate(("aaa", "aaa", "bbb", "bbb")):
        add(run, cell_of("maml", seed), level=0.2 + 0.2 * seed, source=source)
    summary, swept = run.write_summary()
    assert swept == ["source"]
    assert summary["source"].tolist().count("bbb") == 2
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "accuracy", lambda rows: drawn.append(rows) or plots.Figure())
        plots.draw_all(summary, tmp_path, swept)
    assert set(drawn[0]["algorithm"]) == {"maml (source aaa)", "maml (source bbb)"}


def test_costs_are_drawn_in_their_units_with_intervals_in_per_cent(found) -> None:
    board = found.leaderboard
    figure = plots.cost(board, "peak_memory_bytes", "over seeds")
    row = board.iloc[0]
    (container, *_) = figure.axes[0].containers
    ((line, _, (bars,))) = container
    assert line.get_xydata().tolist() == [
        pytest.approx([row["peak_memory_bytes"] / 2**20, 100 * row["mean"]])
    ]
    (segment,) = bars.get_segments()
    assert segment[:, 1].tolist() == pytest.approx([100 * row["low"], 100 * row["high"]])


def test_bars_of_a_summary_are_as_long_as_its_intervals() -> None:
    figure = plots.accuracy(ROWS[(ROWS["seed"] == 0) & (ROWS["algorithm"] == "maml")])
    lengths = [
        segment[1, 1] - segment[0, 1]
        for axis in figure.axes
        for container in axis.containers
        for bars in container[2]
        for segment in bars.get_segments()
    ]
    assert lengths == pytest.approx([2 * 0.02] * len(lengths))
    assert lengths


def test_a_curves_band_goes_from_its_lowest_to_its_highest(found) -> None:
    figure = plots.adaptation(found.leaderboard, found.adaptation)
    mine = found.adaptation[found.adaptation["entry"] == 0]
    (band, *_) = figure.axes[0].collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(100 * mine["low"].min())
    assert heights.max() == pytest.approx(100 * mine["high"].max())
