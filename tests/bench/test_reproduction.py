"""Published results, run again."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import ttest_1samp
from torch import nn

from algorithms import models
from bench import reproduction, stats, waves
from bench.checkpoints import read_tensors
from bench.reproduction import judge, markdown, published, read
from bench.store import CHECKPOINT, Run
from datasets.sinusoid import SinusoidSource
from tests.bench.conftest import TINY

ROOT = Path(__file__).resolve().parents[2]
PAGES = runpy.run_path(str(ROOT / "docs" / "reproduction.py"))
HEADER = (
    "key,algorithm,dataset,ways,shots,metric,value,half_width,interval,transductive,queries,split,"
    "protocol,source,certainty\n"
)


# What was published


def test_every_published_figure_has_a_source_and_a_protocol() -> None:
    rows = pd.read_csv(ROOT / "results" / "published.csv")
    assert rows["key"].is_unique
    assert len(rows) == len(published())
    for figure in published().values():
        assert re.match(r"\w+ et al\. 20\d\d, arXiv \d{4}\.\d{5}", figure.source), figure.key
        assert figure.interval in reproduction.KINDS
        assert (figure.interval == "none") == (figure.half_width is None)
        assert figure.certainty in ("sure", "memory")
        assert figure.transductive in ("yes", "no", "unknown")
        assert 0 < figure.value < 100
        if figure.metric == "accuracy":
            assert figure.key.endswith(f"-{figure.ways}w{figure.shots}s")
            assert figure.value > 100 / figure.ways


# Recipes


@pytest.mark.parametrize("name", reproduction.names())
def test_a_recipe_trains_what_its_published_figure_is_of(name: str) -> None:
    recipe = read(name)
    theirs = published()[recipe.published]
    cells = recipe.sweeps(devices="cpu")[""].cells()
    assert len({cell.seedless_id for cell in cells}) == 1
    cell = cells[0]
    assert cell.algorithm == theirs.algorithm
    assert cell.dataset.startswith(theirs.dataset)
    assert (cell.ways, cell.shots) == (theirs.ways, theirs.shots)
    if theirs.metric == "accuracy" and theirs.transductive != "unknown":
        assert (cell.hyperparameters["norm"] == "transductive") == (theirs.transductive == "yes")
    assert recipe.margin >= (theirs.half_width or 0)
    assert str(cell.shots) in recipe.title
    assert recipe.step is None or recipe.step <= cell.eval_steps


@pytest.mark.parametrize("name", reproduction.names())
def test_a_recipe_leaves_nothing_that_decides_a_figure_to_defaults(name: str) -> None:
    recipe = read(name)
    decisive = ("inner_lr", "inner_steps", "eval_steps", "iterations", "meta_batch", "meta_lr")
    decisive += ("test_shots", "episodes", "val_every", "model")
    for sweep in recipe.sweeps().values():
        assert [n for n in decisive if n not in sweep.set] == []
        ((algorithm, val_every),) = {(cell.algorithm, cell.val_every) for cell in sweep.cells()}
        # The last parameters are kept; in MAML++ those of the best epoch.
        usual = {"maml_pp": 500}.get(algorithm, recipe.sweep["iterations"])
        assert val_every == usual


def test_a_recipe_may_rest_on_another() -> None:
    base, own = read("reptile-omniglot-5w1s"), read("reptile-transductive-omniglot-5w1s")
    assert own.sweep == base.sweep | {"norm": "transductive"}
    assert (own.margin, own.source) == (base.margin, base.source)
    assert own.published != base.published


def test_the_scale_shortens_the_training_and_nothing_else() -> None:
    recipe = read("maml-sinusoid-5")
    for scale, iterations in ((1, 70_000), (0.1, 7_000), (1e-9, 1)):
        for sweep in recipe.sweeps(scale).values():
            cell = sweep.cells()[0]
            assert cell.iterations == iterations
            assert cell.val_every == 70_000
    assert recipe.sweeps()["oracle"].datasets == ["sinusoid_oracle"]
    assert recipe.sweeps()["pretrained"].set["inner_lr"] != recipe.sweeps()[""].set["inner_lr"]


# The verdict


def drawn(mean: float, seeds: int = 1, episodes: int = 50, spread: float = 1.0) -> np.ndarray:
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(seeds, episodes))
    return mean + spread * (noise - noise.mean())


def test_one_seed_agrees_exactly_where_two_one_sided_t_tests_pass() -> None:
    found = set()
    for offset in np.linspace(-1, 1, 81):
        scores = drawn(5 + offset)
        below = ttest_1samp(scores[0], 4.5, alternative="greater").pvalue
        above = ttest_1samp(scores[0], 5.5, alternative="less").pvalue
        expected = max(below, above) < 0.05
        assert (judge(scores, 5.0, 0.5).word == "agrees") == expected
        found.add(expected)
    assert found == {True, False}


@pytest.mark.parametrize("seeds", [1, 5])
def test_the_verdict_says_which_way_ours_differs(seeds: int) -> None:
    assert judge(drawn(5, seeds), 5.0, 1.0).word == "agrees"
    assert judge(drawn(3, seeds), 5.0, 1.0).word == "below"
    assert judge(drawn(7, seeds), 5.0, 1.0).word == "above"
    assert judge(drawn(5, seeds, spread=40), 5.0, 1.0).word == "undecided"


def test_a_wide_published_interval_leaves_a_difference_undecided() -> None:
    assert judge(drawn(3), 5.0, 1.0).word == "below"
    assert judge(drawn(3), 5.0, 1.0, half_95=1.9).word == "below"
    assert judge(drawn(3), 5.0, 1.0, half_95=2.1).word == "undecided"


def test_with_seeds_a_scatter_between_them_counts() -> None:
    """Five seeds of very many episodes: the interval is that of the five means."""
    generator = np.random.default_rng(1)
    means = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    noise = generator.normal(scale=1e-6, size=(5, 200))
    found = judge(means[:, None] + noise, 0.0, 1.0).difference
    expected = stats.mean_interval(means, 0.90)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-5)
    assert found.over == "seeds"


def test_agreement_is_claimed_for_one_in_twenty_at_most_of_those_at_the_margin() -> None:
    generator = np.random.default_rng(2)
    runs = 600
    words = [judge(generator.normal(6.0, 1.0, size=(1, 40)), 5.0, 1.0).word for _ in range(runs)]
    claimed = words.count("agrees") / runs
    assert claimed < 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)
    assert claimed > 0  # or the test says nothing


def test_a_spread_over_initialisations_is_made_an_interval_of_their_mean() -> None:
    anil = published()["anil-omniglot-20w1s"]
    three = np.array([-1.0, 0.0, 1.0]) * anil.half_width  # of that standard deviation
    assert anil.half_95 == pytest.approx(stats.mean_interval(three).half_width, rel=1e-3)


# The command


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place with recipes and published figures of its own."""
    (tmp_path / "recipes").mkdir()
    kept = tmp_path / "kept"
    (kept / "reference").mkdir(parents=True)
    monkeypatch.setattr(reproduction, "RECIPES", tmp_path / "recipes")
    monkeypatch.setattr(reproduction, "results", lambda: kept)
    (kept / "published.csv").write_text(
        HEADER
        + "tiny,maml,tiny,5,1,accuracy,99.5,0.1,episodes,yes,5,,,Somebody 2020,memory\n"
        + "waves,maml,sinusoid,1,5,mse,0.01,,none,unknown,,,,Somebody 2020,sure\n"
    )
    for name, lines in {
        "tiny": [
            *("datasets = ['tiny']", f"plugin = '{TINY}'", "model = 'fc'"),
            *("iterations = 60", "inner_lr = 0.01"),
        ],
        "waves": ["datasets = ['sinusoid']", "ways = [1]", "shots = [5]", "iterations = 30"],
    }.items():
        (tmp_path / "recipes" / f"{name}.toml").write_text(
            f"title = 'MAML on {name}'\nsource = 'Somebody 2020'\npublished = '{name}'\n"
            "margin = 0.5\n[sweep]\nalgos = ['maml']\nmeta_batch = 4\nepisodes = 20\n"
            + "\n".join(lines)
        )
    return tmp_path


def test_a_recipe_ends_in_ours_beside_theirs_and_a_verdict(
    bench, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("reproduce", "tiny", "--scale", "0.1", "--devices", "cpu", "--seeds", "0,1")
    status, out, err = bench(*arguments, "--keep", "kept/reference")
    assert (status, err) == (0, "")
    summary = pd.read_csv("results/tiny/summary.csv")
    assert summary["iterations"].tolist() == [6, 6]
    ours = 100 * summary["mean"].mean()
    assert re.search(rf"ours: +{ours:.2f} ± .*95% over 2 seeds and 20 test episodes", out)
    assert "99.50 ± 0.10 (95% over test episodes) Somebody 2020" in out
    assert re.search(r"verdict: +below", out)
    assert "0.1 of the published iterations (6)" in out
    assert "quoted from memory" in out

    (kept,) = reproduction.references()
    assert kept["mean"] == pytest.approx(ours)
    assert kept["seed_means"] == pytest.approx((100 * summary["mean"]).tolist())
    made = json.loads(Path("results/tiny/environment.json").read_text())
    assert kept["environment"]["commit"] == (made["commit"] or "unknown")
    assert kept["environment"]["processor"] == made["cpu"]
    logs = [
        pd.read_parquet(f"results/tiny/cells/{cell}/training.parquet")["metric"]
        for cell in summary["cell_id"]
    ]
    assert kept["learning"] == pytest.approx((100 * np.mean(logs, axis=0)).tolist())

    # The same command again has nothing to do, and what was kept is listed.
    status, again, _ = bench(*arguments)
    assert status == 0
    assert "2 of 2 cells are done already" in again
    assert f"{ours:.2f}" in again
    status, listed, _ = bench("list", "recipes")
    assert status == 0
    assert re.search(rf"tiny .* 99\.50 .* {ours:.2f} .* at 0\.1 .* core hours", listed)
    line = markdown(reproduction.references()).splitlines()[-1]
    assert line.startswith("| MAML on tiny | 99.50 ± 0.10")
    assert f"{ours:.2f}" in line
    assert line.endswith("| 6 (0.1 of the paper's) | below |")

    # A cost in processor time, of one training in full, whatever the scale.
    steps = pd.concat(
        pd.read_parquet(f"results/tiny/cells/{cell}/performance.parquet")
        for cell in summary["cell_id"]
    ).query("phase == 'meta_step'")
    assert kept["train_core_hours"] == pytest.approx(6 * steps["process_seconds"].median() / 3600)
    assert {row["gpu"] for row in reproduction.listing()} == {""}


def test_a_recipe_of_waves_draws_how_the_network_adapts(bench, place: Path) -> None:
    recipe = place / "recipes" / "waves.toml"
    recipe.write_text(
        recipe.read_text()
        + "\nmodel = 'mlp'\ninner_lr = 0.01\neval_steps = 10\n"
        + "[beside.oracle]\nalgos = ['pretrained']\ndatasets = ['sinusoid_oracle']\n"
    )
    status, out, _ = bench("reproduce", "waves", "--devices", "cpu")
    assert status == 0
    for name in ("fits", "errors"):
        assert (place / "results" / "waves" / "figures" / f"{name}.png").stat().st_size > 10_000
        assert f"{name}.png" in out

    run = Run(place / "results" / "waves")
    (record,) = run.records()
    shown = waves.fit(run, record, episode=3)
    spec, source = record.cell.test_spec, SinusoidSource()
    amplitude, phase, _ = source.waves(spec, [3])
    assert shown.target == pytest.approx(amplitude[0] * np.sin(shown.x - phase[0]))

    # The same by plain torch: gradient descent on the support points.
    net = models.build("mlp", (1,), 1, seed=0)
    path = run.cells / record.cell.id / CHECKPOINT
    net.load_state_dict(read_tensors(path, cell=record.cell.id, source=record.source))
    x, y = (half[0] for half in source.batch(spec, [3])["train"])
    assert shown.support == pytest.approx(torch.cat([x, y], 1).T.numpy())
    descent = torch.optim.SGD(net.parameters(), lr=0.01)
    grid = torch.from_numpy(shown.x)[:, None].float()
    for step in range(11):
        if step in shown.predictions:
            expected = net(grid)[:, 0].detach().numpy()
            assert shown.predictions[step] == pytest.approx(expected, abs=1e-4)
        descent.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        descent.step()


def test_a_fit_goes_by_the_rates_that_were_learned(bench, tmp_path: Path) -> None:
    asked = ("--datasets", "sinusoid", "--shots", "10", "--devices", "cpu", "--iterations", "30")
    learn = ("--set", "meta_lr=0.01", "--eval-steps", "1", "--episodes", "20", "--costs", "never")
    assert bench("run", "--algos", "meta_sgd", *asked, *learn, "--out", "r")[0] == 0
    run = Run(tmp_path / "r")
    (record,) = run.records()
    shown = waves.fit(run, record, episode=3)

    cell = record.cell
    path = run.cells / cell.id / CHECKPOINT
    state = read_tensors(path, cell=cell.id, source=record.source)
    net = models.build("mlp", (1,), 1, seed=0)
    net.load_state_dict({name: state[name] for name in net.state_dict()})
    x, y = (half[0] for half in SinusoidSource().batch(cell.test_spec, [3])["train"])
    nn.functional.mse_loss(net(x), y).backward()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            rate = state[f"meta_sgd/alpha.{name}"]
            assert not torch.equal(rate, torch.full_like(rate, cell.hyperparameters["inner_lr"]))
            parameter -= rate * parameter.grad
        expected = net(torch.from_numpy(shown.x)[:, None].float())[:, 0].numpy()
    assert shown.predictions[1] == pytest.approx(expected, abs=1e-4)


def test_the_band_of_errors_is_over_seeds_where_there_are_seeds() -> None:
    generator = np.random.default_rng(0)
    scores = [generator.random((30, 4)) for _ in range(3)]
    mean, low, _ = waves.error_by_step(scores)
    over_seeds = stats.mean_interval([each[:, 2].mean() for each in scores])
    assert (mean[2], low[2]) == pytest.approx((over_seeds.estimate, over_seeds.low))
    _, low, high = waves.error_by_step(scores[:1])
    over_episodes = stats.mean_interval(scores[0][:, 1])
    assert (low[1], high[1]) == pytest.approx((over_episodes.low, over_episodes.high))


def test_a_cell_that_fails_leaves_no_verdict(bench, place: Path) -> None:
    recipe = place / "recipes" / "tiny.toml"
    recipe.write_text(recipe.read_text().replace("'maml'", "'diverging'"))
    status, out, _ = bench("reproduce", "tiny", "--devices", "cpu", "--keep", "kept/reference")
    assert status == 1
    assert "no verdict" in out
    assert "verdict:" not in out
    assert reproduction.references() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("maml-omniglot-5w1",), "no recipe is called 'maml-omniglot-5w1'; did you mean "),
        (("nothing like it",), "no recipe is called 'nothing like it'; see 'python -m bench list"),
        (("maml-sinusoid-5", "--scale", "0"), "scale is 0.0; it must be positive"),
        (("maml-sinusoid-5", "--scale", "nan"), "scale is nan; it must be positive"),
        (("maml-sinusoid-5", "--seeds", "x"), "seeds: 'x' is not an integer"),
        (("maml-omniglot-5w1s", "--data-root", "nowhere"), "nowhere"),
        (("maml-sinusoid-5", "--keep", "a-file"), "a-file is not a folder"),
    ],
)
def test_bad_input_ends_in_one_line_and_status_2_with_nothing_written(
    bench, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "a-file").touch()
    status, out, err = bench("reproduce", *arguments)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["a-file"]


# The pages


@pytest.mark.parametrize("page", PAGES["PAGES"], ids=lambda page: page.name)
def test_the_tables_of_a_page_are_what_the_reference_files_say(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<!-- reproduced -->" in text
    assert PAGES["updated"](text) == text


def test_a_table_is_put_between_its_markers() -> None:
    text = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n"
    assert PAGES["filled"](text, "x", "new\n") == "a\n<!-- x -->\nnew\n<!-- /x -->\nb\n"
    assert PAGES["filled"](text, "y", "new\n") == text


def test_a_reference_is_of_a_recipe_and_says_what_made_it() -> None:
    for kept in reproduction.references():
        recipe = read(kept["recipe"])
        assert recipe.sweeps(kept["scale"])[""].set["iterations"] == [kept["iterations"]]
        assert kept["mean"] == pytest.approx(np.mean(kept["seed_means"]))
        assert len(kept["seed_means"]) == len(kept["seeds"]) == len(kept["train_seconds"])
        assert re.fullmatch(r"[0-9a-f]{40}", kept["environment"]["commit"])  # and no changes


def kept_comparison(folder: Path, board: dict, summary: dict, pairs: dict) -> None:
    folder.mkdir(parents=True)
    for name, columns in (("leaderboard", board), ("summary", summary), ("comparison", pairs)):
        pd.DataFrame(columns).to_csv(folder / f"{name}.csv", index=False)


def test_the_table_of_algorithms_says_which_are_not_told_apart_from_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PAGES["compared"].__globals__, "COMPARISON", tmp_path)
    shared = {"ways": 5, "shots": 1, "ci_episodes": 0.01, "iterations": 150, "meta_batch": 4}
    costs = {"step_gflops": 1.25, "step_process_ms": 30, "eval_process_ms": 2}
    board = {"algorithm": ["anil", "maml", "nearest"], "mean": [0.7, 0.69, 0.4]}
    board |= {"peak_memory_bytes": [3 * 2**20, 2**20, None]} | shared | costs
    board |= {"gradients_per_step": [8, 8, 0]}
    pairs = {
        "algorithm_a": ["anil", "anil", "maml"],
        "algorithm_b": ["maml", "nearest", "nearest"],
        "better": ["", "anil", "maml"],
        "over": "seeds",
    }
    seeds = {"algorithm": ["anil", "anil", "maml", "maml", "nearest", "nearest"]}
    seeds["mean"] = [0.6, 0.8, 0.68, 0.7, 0.4, 0.4]
    kept_comparison(tmp_path / "glyphs", board | {"seeds": 2}, seeds, pairs)
    kept_comparison(tmp_path / "lake", board | {"seeds": 1}, seeds, pairs)
    lines = PAGES["compared"]().splitlines()
    assert lines[0].startswith("| algorithm | glyphs, 5-way 1-shot, 2 seeds | meta-step, GFLOPs |")
    assert lines[2] == "| `anil` | **70.0 ± 1.0** (60.0 to 80.0) | 1.25 | 30 | 3 | 2.0 |"
    assert lines[3].startswith("| `maml` | **69.0 ± 1.0** (68.0 to 70.0) |")
    assert lines[4] == "| `nearest` | 40.0 ± 1.0 (40.0 to 40.0) | 1.25 | 30 |  | 2.0 |"
    assert lines[6] == "Told apart, after Holm: 2 of 3 pairs on glyphs, over seeds."
    errors = PAGES["challenge"]().splitlines()
    assert errors[2] == "| `anil` | 30.0 ± 1.0 | 150 iterations of 4 tasks, here |"
    assert errors[4] == "| `nearest` | 60.0 ± 1.0 | none |"
    assert errors[-1].endswith("| published |")
