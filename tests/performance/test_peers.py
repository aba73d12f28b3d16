"""The benchmark of the engines against their peers: what of it needs no other library, no clock."""

import json
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.stats import paired_ratio
from tests.performance.peers import autograd_loop, engines
from tests.performance.peers.__main__ import main
from tests.performance.peers.comparison import Comparison
from tests.performance.peers.serve import detached
from tests.performance.peers.work import SETTINGS, Arrays, Work, relative_error

ROOT = Path(__file__).resolve().parents[2]
PAGE = runpy.run_path(str(ROOT / "docs" / "performance.py"))
TEXT = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


def small(name: str) -> Work:
    """A setting's work in float64, with less of everything that a test of a gradient can spare."""
    setting = SETTINGS[name]
    less = {"tasks": 2, "queries": min(2, setting.queries), "steps": min(2, setting.steps)}
    if setting.model == "conv4_pool":
        less["shape"] = (3, 18, 18)
    return engines.work_of(replace(setting, **less)).of("float64")


def answer(step) -> Arrays:
    return {name: np.array(detached(value)) for name, value in step().items()}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_autograd_loop_and_both_engines_compute_the_same(name: str) -> None:
    work = small(name)
    step = autograd_loop.prepare(work)
    found = answer(step)
    for engine in ("higher", "batched"):
        assert relative_error(answer(engines.prepare(work, engine)), found) < 1e-10
    assert relative_error(answer(step), found) == 0  # nothing adds up from one step to the next
    if work.setting.kind == "evaluation":
        assert found["loss"].shape == (2, 3)
    else:
        assert found.keys() == work.weights.keys()


def measured(commit: str, *settings: str, cpu: str = "c", growth: bool = False) -> dict:
    rows = {name: {"setting": {"title": f"the {name}"}, "of": commit} for name in settings}
    return {
        "settings": rows,
        "growth": [commit] if growth else [],
        "made": {"commit": commit, "cpu": cpu},
    }


def test_a_part_measured_again_takes_its_place_and_says_when() -> None:
    whole = measured("first", "a", "b", growth=True)
    joined = PAGE["joined"](whole, measured("second", "b"))
    assert [row["of"] for row in joined["settings"].values()] == ["first", "second"]
    assert (joined["made"], joined["growth"]) == (whole["made"], ["first"])
    assert PAGE["later"](joined) == " Measured again by itself at commit `second`: the b."
    assert PAGE["later"](whole) == ""
    again = measured("third", "a", "b", growth=True)
    assert PAGE["joined"](joined, again) == again
    with pytest.raises(ValueError, match="another machine"):
        PAGE["joined"](whole, measured("second", "b", cpu="d"))


def test_first_and_second_order_are_told_apart() -> None:
    second, first = (autograd_loop.prepare(small(f"omniglot{o}")) for o in ("", "-first-order"))
    assert relative_error(answer(first), answer(second)) > 0.01


def test_results_of_other_parameters_are_no_agreement() -> None:
    one = {"a": np.ones(2)}
    assert relative_error({"a": np.array([1.0, 1.1])}, one) == pytest.approx(0.1 / 2**0.5)
    assert relative_error(one | {"b": np.ones(1)}, one) == float("inf")


def test_a_subject_that_disagrees_or_cannot_start_is_reported_and_not_timed() -> None:
    said: list[str] = []
    comparison = Comparison(["autograd loop"], Path("nowhere"), 1, 0.0, said.append)
    comparison.names = []  # no process is needed to refuse
    rows = comparison.timed("x", small("sinusoid"), {"A": 2e-3, "B": "not installed"})["subjects"]
    assert rows["A"] == {
        "error_float64": 2e-3,
        "why": "wrong: its relative error in float64 is 2.0e-03",
    }
    assert rows["B"] == {"why": "not installed"}
    assert [line.split(" is not timed")[0] for line in said[:2]] == ["x: A", "x: B"]


def test_what_is_measured_fills_the_page(tmp_path: Path) -> None:
    out = tmp_path / "measured.json"
    arguments = ["--settings", "sinusoid", "--subjects", "autograd loop,higher"]
    arguments += ["--threads", "1", "--seconds", "0", "--out", str(out)]
    assert main([*arguments, "--peers", str(tmp_path)]) == 0
    measured = json.loads(out.read_text())
    row = measured["settings"]["sinusoid"]
    times = {name: each["seconds"] for name, each in row["subjects"].items()}
    assert [len(seconds) for seconds in times.values()] == [6, 6]
    assert row["subjects"]["autograd loop"]["error_float64"] < 1e-12
    # 25 tasks: forward and backward of the support set, and again of both in the outer gradient.
    assert row["flops"] > 25 * 20 * 2 * 40 * 40
    page = PAGE["updated"](TEXT, measured)
    middle = PAGE["milliseconds"](np.median(times["higher"]))
    assert f"| {middle} (" in page
    assert "not timed" in PAGE["ratios"](measured)  # there is no batched engine to hold it against
    assert PAGE["updated"](page, measured) == page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--settings", "omniglt"], "no setting is called 'omniglt'; there are omniglot,"),
        (["--subjects", "JAX"], "no subject is called 'JAX'; there are batched, higher, autograd"),
        (["--threads", "0"], "threads is 0; it must be at least 1"),
    ],
)
def test_bad_input_ends_in_one_line_and_status_2_with_nothing_written(
    arguments: list, message: str, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "measured.json"
    assert main([*arguments, "--peers", str(tmp_path), "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert not out.exists()


# The page


def test_the_tables_of_the_page_are_what_was_measured() -> None:
    kept = PAGE["MEASURED"]
    measured = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else None
    assert PAGE["updated"](TEXT, measured) == TEXT
    for name in PAGE["BLOCKS"]:
        assert TEXT.count(f"<!-- {name} -->\n") == TEXT.count(f"<!-- /{name} -->\n") == 1
    assert ("](performance-scaling.png)" in TEXT) == PAGE["FIGURE"].exists()


def test_the_figure_has_a_panel_for_each_axis_and_the_slopes_it_shows() -> None:
    rows = [
        {"axis": axis, "value": value, "engine": engine, "seconds": [value**exponent] * 3}
        for axis, exponent in (("tasks", 0.5), ("steps", 1.0))
        for value in (1, 2, 4, 8)
        for engine in ("batched", "higher")
    ]
    measured = {"growth": rows}
    figure = PAGE["drawn"](measured)
    shown = [[text.get_text() for text in p.get_legend().get_texts()] for p in figure.axes]
    assert shown[0] == ["batched: slope 0.50", "higher: slope 0.50"]
    assert shown[1] == ["batched: slope 1.00", "higher: slope 1.00"]
    assert "| tasks | batched | 1 to 8 | 1000 to 2828 | 0.50 [0.50, 0.50] | no |" in PAGE["growth"](
        measured
    )


def test_a_slope_is_the_exponent_of_a_power_law() -> None:
    sizes = [1, 2, 4, 8]
    assert PAGE["slope"](sizes, [0.3 * size**1.5 for size in sizes]) == pytest.approx((1.5,) * 3)
    found = PAGE["slope"](sizes, [1.0, 2.2, 3.7, 8.1])
    assert found.low < 1 < found.high
    assert found.estimate - found.low == pytest.approx(found.high - found.estimate)


def test_ratios_are_those_of_rounds() -> None:
    made = {"product_flops": 10, "packages": {"torch": "2"}}
    subjects = {"batched": [1.0, 2, 4, 1, 2, 4], "TorchOpt": [3.0, 6, 12, 3, 6, 12]}
    row = {
        "setting": {"title": "t", "kind": "maml", "tasks": 1},
        "flops": 10,
        "product_seconds": [0.5] * 6,
        "subjects": {name: {"seconds": seconds} for name, seconds in subjects.items()},
    }
    measured = {"made": made, "settings": {"t": row}, "growth": []}
    assert "| t | 3.00 [3.00, 3.00] | TorchOpt, 3.00 |" in PAGE["ratios"](measured)
    assert paired_ratio(subjects["TorchOpt"], subjects["batched"]).estimate == pytest.approx(3)
    assert "| t | 1e-08 | 500 | 2000 (25%) | 6000 (8%) |" in PAGE["speed"](measured)
