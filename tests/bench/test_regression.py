"""The check catches what got worse, lets noise pass, and names what it could not hold against."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bench import regression
from bench.errors import BenchError
from bench.regression import check, growth
from bench.store import Run
from tests.bench.conftest import QUICK
from tests.bench.test_comparison import cell_of, costs, put, scores_of

BASE = scores_of(0.6)


def noisy(performance: pd.DataFrame, spread: float, seed: int) -> pd.DataFrame:
    """Costs whose repeats scatter."""
    factor = np.exp(spread * np.random.default_rng(seed).standard_normal(len(performance)))
    times = performance[["seconds", "process_seconds"]].mul(factor, axis=0)
    return performance.assign(**times)


def verdicts(found: regression.Check) -> dict[str, str]:
    return {finding.quantity: finding.verdict for finding in found.findings}


def test_an_identical_run_passes(tmp_path: Path) -> None:
    for name in ("old", "new"):
        put(tmp_path / name, cell_of(), BASE, costs())
    found = check(tmp_path / "new", tmp_path / "old")
    assert not found.regressed
    assert verdicts(found) == {
        f"{phase}{cost}": "ok"
        for phase, kinds in (
            ("accuracy", [""]),
            ("meta-step ", ["wall time", "CPU time", "memory"]),
            ("evaluation ", ["wall time", "CPU time", "memory"]),
        )
        for cost in kinds
    }


@pytest.mark.parametrize(
    ("mean", "spread", "verdict"),
    [
        (-0.03, 0.02, "worse"),
        (-0.002, 0.02, "ok"),  # less than the margin, and enough episodes to know
        (0.02, 0.02, "ok"),
        (0.0, 0.2, "not ruled out"),  # too few episodes to know
        (-0.009, 0.02, "worse"),  # a loss below the margin is shown, one of the margin possible
    ],
)
def test_a_loss_of_the_margin_has_to_be_ruled_out(
    tmp_path: Path, mean: float, spread: float, verdict: str
) -> None:
    noise = np.random.default_rng(1).standard_normal(100)
    change = mean + spread * (noise - noise.mean()) / noise.std(ddof=1)
    put(tmp_path / "old", cell_of(), BASE)
    put(tmp_path / "new", cell_of(), BASE + change)
    found = check(tmp_path / "new", tmp_path / "old")
    (finding,) = found.findings
    assert finding.verdict == verdict
    assert found.regressed == (verdict != "ok")
    assert finding.change == pytest.approx(100 * mean, abs=1e-9)
    half = 100 * spread / 10 * 1.660391  # t(0.95) with 99 degrees of freedom
    assert (finding.low, finding.high) == pytest.approx((100 * mean - half, 100 * mean + half))
    assert ("episodes would tell" in finding.remark) == (verdict == "not ruled out")
    assert not check(tmp_path / "new", tmp_path / "old", margin=10).regressed


def test_seeds_are_averaged_before_the_test(tmp_path: Path) -> None:
    for seed, change in ((0, -0.1), (1, 0.1)):
        put(tmp_path / "old", cell_of(seeds=[seed]), BASE)
        put(tmp_path / "new", cell_of(seeds=[seed]), BASE + change)
    (finding,) = check(tmp_path / "new", tmp_path / "old").findings
    assert finding.change == pytest.approx(0, abs=1e-9)
    assert finding.verdict == "ok"


def test_of_an_error_more_is_worse_and_the_margin_a_share_of_it(tmp_path: Path) -> None:
    settings = {"datasets": ["sinusoid"]}
    put(tmp_path / "old", cell_of(**settings), 4 * BASE, metric="mse")
    put(tmp_path / "new", cell_of(**settings), 4 * BASE * 1.05, metric="mse")
    (finding,) = check(tmp_path / "new", tmp_path / "old").findings
    assert (finding.verdict, finding.unit, finding.limit) == ("worse", "%", 1)
    assert finding.change == pytest.approx(5)
    assert not check(tmp_path / "old", tmp_path / "new").regressed


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_a_slowdown_is_caught_and_sized(tmp_path: Path, noise: float) -> None:
    put(tmp_path / "old", cell_of(), BASE, noisy(costs(0.1), noise, 1))
    put(tmp_path / "new", cell_of(), BASE, noisy(costs(0.125), noise, 2))
    found = check(tmp_path / "new", tmp_path / "old")
    worse = {finding.quantity: finding for finding in found.worse}
    assert {"meta-step wall time", "meta-step CPU time", "evaluation CPU time"} <= worse.keys()
    slower = worse["meta-step CPU time"]
    assert slower.change == pytest.approx(25, abs=150 * noise + 1e-6)
    assert slower.low <= 25 + 1e-6
    assert slower.high >= 25 - 1e-6
    assert not check(tmp_path / "new", tmp_path / "old", slowdown=40).regressed


def test_noise_is_no_alarm(tmp_path: Path) -> None:
    put(tmp_path / "old", cell_of(), BASE, noisy(costs(0.1), 0.3, 1))
    put(tmp_path / "new", cell_of(), BASE, noisy(costs(0.125), 0.3, 2))
    found = check(tmp_path / "new", tmp_path / "old")
    assert not found.regressed
    assert "too noisy" in verdicts(found).values()
    assert "too noisy to tell" in found.conclusion


def test_clean_repeats_of_noisy_measurements_raise_no_alarm(tmp_path: Path) -> None:
    put(tmp_path / "old", cell_of(), BASE, noisy(costs(), 0.1, 0))
    for seed in range(1, 21):
        put(tmp_path / f"{seed}", cell_of(), BASE, noisy(costs(), 0.1, seed))
        assert not check(tmp_path / f"{seed}", tmp_path / "old").regressed


def test_a_slower_machine_is_not_a_slowdown(tmp_path: Path) -> None:
    slower = costs().assign(seconds=lambda rows: 3 * rows["seconds"])
    put(tmp_path / "old", cell_of(), BASE, costs())
    put(tmp_path / "new", cell_of(), BASE, slower)
    assert not check(tmp_path / "new", tmp_path / "old").regressed


def test_memory_is_caught_above_the_allocators_own_ups_and_downs(tmp_path: Path) -> None:
    mib = 2**20
    put(tmp_path / "old", cell_of(), BASE, costs(peak=200 * mib))
    put(tmp_path / "new", cell_of(), BASE, costs(peak=300 * mib))
    found = check(tmp_path / "new", tmp_path / "old")
    assert [finding.quantity for finding in found.worse] == [
        *("meta-step memory", "evaluation memory")
    ]
    assert found.worse[0].change == pytest.approx(50)
    put(tmp_path / "small", cell_of(), BASE, costs(peak=20 * mib))
    put(tmp_path / "grown", cell_of(), BASE, costs(peak=40 * mib))
    assert not check(tmp_path / "grown", tmp_path / "small").regressed


def test_growth_of_known_samples_is_their_ratio_and_covers_it() -> None:
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        # Sessions differ by as much as repeats do: what the interval says it allows.
        sides = [generator.normal(0, 0.1) + 0.1 * generator.standard_normal(7) for _ in range(2)]
        ratio = growth([(sides[0] + np.log(1.25), sides[1])])
        inside += ratio.low < 1.25 < ratio.high
    assert 930 <= inside <= 980
    exact = growth([(np.log([2.0, 2.0]), np.log([1.0, 1.0]))])
    assert (exact.estimate, exact.low, exact.high) == pytest.approx((2, 2, 2))


def test_cells_without_a_counterpart_are_named_and_those_of_the_baseline_a_regression(
    tmp_path: Path,
) -> None:
    for name in ("old", "new"):
        put(tmp_path / name, cell_of(), BASE)
    put(tmp_path / "old", cell_of("anil"), BASE)
    put(tmp_path / "new", cell_of("fomaml"), BASE)
    found = check(tmp_path / "new", tmp_path / "old")
    assert found.regressed
    assert found.conclusion == "regression: cells of the baseline that are not here: 1"
    foreseen = check(tmp_path / "new", tmp_path / "old", allow_missing=True)
    assert not foreseen.regressed
    assert foreseen.conclusion.endswith("cells of the baseline that are not here: 1")
    assert not check(tmp_path / "old", tmp_path / "old").regressed
    notes = "\n".join(found.notes)
    assert f"in {tmp_path / 'old'} alone: anil glyphs 5-way 1-shot seed 0" in notes
    assert f"in {tmp_path / 'new'} alone: fomaml glyphs" in notes
    assert "costs were not measured in both runs" in notes


def test_other_test_episodes_are_no_counterpart(tmp_path: Path) -> None:
    put(tmp_path / "old", cell_of(), BASE)
    put(tmp_path / "new", cell_of(eval_seed=1), BASE)
    with pytest.raises(BenchError, match=r"no cell of .* has a counterpart"):
        check(tmp_path / "new", tmp_path / "old")


def test_a_changed_default_is_checked_and_named(tmp_path: Path) -> None:
    put(tmp_path / "old", cell_of(), BASE)
    put(tmp_path / "new", cell_of(inner_lr=0.4), BASE - 0.05)
    found = check(tmp_path / "new", tmp_path / "old")
    assert found.regressed
    assert any("settings changed: inner_lr 0.1 -> 0.4" in note for note in found.notes)


def test_cells_of_one_place_are_paired_by_their_settings(tmp_path: Path) -> None:
    for rate, level in ((0.1, 0.0), (0.4, -0.2)):
        for name in ("old", "new"):
            put(tmp_path / name, cell_of(inner_lr=rate), BASE + level)
    found = check(tmp_path / "new", tmp_path / "old")
    assert [finding.change for finding in found.findings] == [0, 0]
    assert {finding.setting for finding in found.findings} == {
        "maml on glyphs 5-way 1-shot (inner_lr 0.1)",
        "maml on glyphs 5-way 1-shot (inner_lr 0.4)",
    }


def test_too_few_episodes_are_said_to_be_how_many_too_few(tmp_path: Path) -> None:
    """One-sided at 5% with 80% power: ((1.645 + 0.842) 0.2 / 0.01)^2 is 2,473."""
    noise = np.random.default_rng(1).standard_normal(100)
    put(tmp_path / "old", cell_of(), BASE)
    put(tmp_path / "new", cell_of(), BASE + 0.2 * (noise - noise.mean()) / noise.std(ddof=1))
    (finding,) = check(tmp_path / "new", tmp_path / "old").findings
    needed = int(finding.remark.split(" ")[0].replace(",", ""))
    assert needed == pytest.approx(2473, rel=0.01)


def test_a_cell_that_fails_now_is_a_regression(tmp_path: Path) -> None:
    for name in ("old", "new"):
        put(tmp_path / name, cell_of(), BASE)
    put(tmp_path / "old", cell_of("anil"), BASE)
    Run(tmp_path / "new").fail(cell_of("anil"), "diverged")
    found = check(tmp_path / "new", tmp_path / "old")
    assert found.regressed
    assert "failed: anil glyphs" in found.conclusion


def test_a_changed_default_that_makes_a_cell_fail_is_a_regression(tmp_path: Path) -> None:
    for name in ("maml", "fomaml"):
        put(tmp_path / "old", cell_of(name), BASE)
    put(tmp_path / "new", cell_of("fomaml"), BASE)
    Run(tmp_path / "new").fail(cell_of("maml", inner_lr=[0.9]), "diverged", 7)
    found = check(tmp_path / "new", tmp_path / "old")
    assert found.regressed
    assert found.failed == ["maml glyphs 5-way 1-shot seed 0 (diverged)"]


def test_a_run_of_nothing_but_failures_is_a_regression(bench, tmp_path: Path) -> None:
    put(tmp_path / "old", cell_of("maml"), BASE)
    new = Run(tmp_path / "new")
    new.cells.mkdir(parents=True)
    new.fail(cell_of("maml", inner_lr=[0.9]), "no memory")
    status, out, err = bench("check", str(tmp_path / "new"), "--baseline", str(tmp_path / "old"))
    assert (status, err) == (1, "")
    assert "failed: maml glyphs 5-way 1-shot seed 0 (failed)" in " ".join(out.split())


def test_the_command_exits_1_with_a_table_and_a_job_summary(bench, tmp_path: Path) -> None:
    put(tmp_path / "old", cell_of(), BASE, costs(0.1))
    put(tmp_path / "new", cell_of(), BASE - 0.03, costs(0.2))
    status, out, err = bench("check", "new", "--baseline", "old")
    assert (status, err) == (1, "")
    assert "what raised the alarm" in out
    assert "-3.0 points" in out
    assert "+100.0 %" in out
    status, out, _ = bench("check", "new", "--baseline", "old", "--format", "github")
    assert status == 1
    assert out.startswith("### :x: regression: ")
    row = (
        "| maml on glyphs 5-way 1-shot | accuracy | -3.0 points | [-3.0, -3.0] | -1 points | worse"
    )
    assert row in out
    status, out, _ = bench("check", "old", "--baseline", "old")
    assert status == 0
    assert "no regression in 7 checks" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "--baseline", "old"), "there is no run in nowhere"),
        (("old", "--baseline", "old", "--margin", "0"), "margin: 0 is not a positive number"),
        (("old", "--baseline", "old", "--slowdown", "nan"), "slowdown: nan is not a positive"),
        (("old",), "Missing option '--baseline'"),
    ],
)
def test_bad_input_ends_in_one_line(bench, tmp_path: Path, arguments, message) -> None:
    put(tmp_path / "old", cell_of(), BASE)
    status, out, err = bench("check", *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_real_run_holds_against_itself(bench, fresh_processes) -> None:
    bench("run", "--algos", "maml", *QUICK, "--out", "r")
    status, out, err = bench("check", "r", "--baseline", "r")
    assert (status, err) == (0, "")
    assert "no regression in 7 checks" in out
