"""The report: its tables, its documents, and its page as a person (or a screen reader) meets it."""

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from bench import findings, paper, report, tables
from bench.failures import lost, scoreless
from bench.store import SCORES, Run
from tests.bench.conftest import QUICK
from tests.bench.made_up import EPISODES, LEVELS, NASTY, add, cell_of, nasty

CURVE_COLUMNS = ["entry", "step", "mean", "low", "high"]


def sample(folder: Path) -> Run:
    """Three algorithms on two tasks, two seeds of each, and an error on a third task."""
    run = Run(folder)
    run.cells.mkdir(parents=True)
    for algorithm in LEVELS:
        for seed in (0, 1):
            add(run, cell_of(algorithm, seed))
            add(run, cell_of(algorithm, seed, shots=5, train_shots=5), level=0.9)
    for algorithm in ("maml", "anil"):
        add(run, cell_of(algorithm, dataset="sinusoid", shots=10), "mse", LEVELS[algorithm])
    asked = (
        'algos = ["maml", "anil", "reptile"]\ndatasets = ["glyphs"]\nshots = [1, 5]\n'
        'seeds = [0, 1]\ndevices = ["cpu"]\niterations = 80\nmeta_clip = 10.0\n'
    )
    (run.folder / "sweep.toml").write_text(asked)
    (run.folder / "environment.json").write_text(json.dumps({"cpu": "<abacus>", "cuda": None}))
    return run


def swept(folder: Path) -> Run:
    """Three algorithms at three inner step sizes and two norms."""
    run = Run(folder)
    run.cells.mkdir(parents=True)
    for algorithm, level in LEVELS.items():
        for inner_lr in (0.01, 0.1, 1.0):
            for norm in ("single", "support"):
                own = {"inner_steps": 1, "inner_lr": inner_lr, "norm": norm}
                add(run, cell_of(algorithm, hyperparameters=own), level=level * (1 - inner_lr / 4))
    (run.folder / "sweep.toml").write_text(
        'algos = ["maml", "anil", "reptile"]\nseeds = [0]\ndevices = ["cpu"]\n'
        "iterations = 80\n[set]\ninner_lr = [0.01, 0.1, 1, 10]\nnorm = ['single', 'support']\n"
    )
    return run


def score_at(run: Run, **settings: Any) -> float:
    """MAML's mean where its hyperparameters are these."""
    (found,) = (
        record.figures["mean"]
        for record in run.records()
        if record.cell.algorithm == "maml" and settings.items() <= record.cell.row().items()
    )
    return float(found)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return sample(tmp_path / "a run")


# Tables


def test_an_entry_is_one_algorithm_over_its_seeds_with_both_intervals(run: Run) -> None:
    board = tables.read(run).leaderboard
    assert len(board) == 8
    maml = board[(board["algorithm"] == "maml") & (board["shots"] == 1)].iloc[0]
    means = [r.figures["mean"] for r in run.records() if r.cell.algorithm == "maml"][:2]
    assert maml["mean"] == pytest.approx(np.mean(means))
    assert maml["ci_seeds"] == pytest.approx(12.7062 * np.std(means, ddof=1) / 2**0.5, rel=1e-4)
    scores = [run.scores(cell_of("maml", seed)).query("step == 3")["metric"] for seed in (0, 1)]
    together = np.mean(scores, axis=0)
    assert maml["ci_episodes"] == pytest.approx(
        2.022691 * together.std(ddof=1) / EPISODES**0.5, rel=1e-5
    )
    assert maml["over"] == "seeds"


def test_one_seed_has_an_interval_over_episodes_only(run: Run) -> None:
    board = tables.read(run).leaderboard
    sinusoid = board[board["dataset"] == "sinusoid"]
    assert sinusoid["ci_seeds"].isna().all()
    assert set(sinusoid["over"]) == {"episodes"}


def test_the_best_come_first_and_a_lower_error_is_better(run: Run) -> None:
    board = tables.read(run).leaderboard
    by_task = board.groupby(["dataset", "shots"])["algorithm"].agg(list)
    assert by_task["glyphs", 1] == ["maml", "reptile", "anil"]
    assert by_task["sinusoid", 10] == ["anil", "maml"]


def test_curves_start_before_the_first_step_and_end_after_the_last(run: Run) -> None:
    found = tables.read(run)
    first = found.adaptation[found.adaptation["entry"] == 0]
    assert first["step"].tolist() == [0, 1, 2, 3]
    assert first["mean"].iloc[-1] == pytest.approx(found.leaderboard["mean"].iloc[0])
    validations = found.learning.query("entry == 0 and of == 'validation'")
    assert validations["iteration"].tolist() == [20, 40, 60, 80]
    assert validations["seconds"].tolist() == pytest.approx([2, 4, 6, 8])


def test_long_trainings_are_thinned_to_their_bins_means(run: Run) -> None:
    frame = pd.DataFrame({"iteration": range(1, 1001), "metric": 0.0, "seconds": 1.0})
    frame["metric"] = frame["iteration"]
    curve = pd.DataFrame(tables._curve({name: frame[name].to_numpy() for name in frame}))
    assert len(curve) == tables.POINTS
    assert curve["iteration"].iloc[-1] == curve["seconds"].iloc[-1] == 1000
    assert curve["value"].iloc[0] == pytest.approx(frame["metric"].head(16).mean(), abs=1)


def test_entries_of_one_algorithm_are_told_apart_by_what_differs(run: Run) -> None:
    add(run, cell_of("maml", eval_steps=5))
    board = tables.read(run).leaderboard
    labels = board[(board["shots"] == 1) & (board["algorithm"] == "maml")]["label"]
    assert sorted(labels) == ["maml (eval_steps 3)", "maml (eval_steps 5)"]
    assert "eval_steps" in tables.varying(board)
    assert ["eval_steps"] in list(tables.unlike(board).values())


def test_the_pareto_front_holds_what_nothing_beats_on_both_counts() -> None:
    cost = pd.Series([1.0, 2.0, 2.0, 3.0, 4.0, np.nan])
    merit = pd.Series([0.5, 0.7, 0.6, 0.7, 0.9, 1.0])
    assert tables.pareto(cost, merit).tolist() == [True, True, False, False, True, False]


def test_damaged_failed_and_missing_cells_are_named_and_the_others_go_on(run: Run) -> None:
    first, second, third = (cell_of("anil", seed, shots=s) for seed, s in ((0, 1), (1, 1), (0, 1)))
    (run.cells / first.id / SCORES).write_bytes(b"not parquet")
    (run.cells / second.id / "cell.json").write_text("{")
    (run.cells / "0123456789abcdef").mkdir()
    run.fail(cell_of("diverging"), "diverged: the loss is nan", 3)
    run.fail(cell_of("maml", 7), "it raised")
    sweep = (run.folder / "sweep.toml").read_text()
    (run.folder / "sweep.toml").write_text(sweep.replace('"maml"', '"maml", "protonet"'))
    found = tables.read(run)
    faults = found.faults.set_index("cell")
    assert faults.loc[f"{third} (cells/{first.id})", "status"] == "damaged"
    assert faults.loc[f"cells/{second.id}", "reason"] == "cell.json is not JSON"
    assert faults.loc["cells/0123456789abcdef", "reason"] == "cell.json is absent or empty"
    assert faults.loc["diverging glyphs 5-way 1-shot seed 0", "reason"].startswith("diverged")
    assert faults.loc["diverging glyphs 5-way 1-shot seed 0", "status"] == "diverged"
    assert faults.loc["protonet glyphs 5-way 5-shot seed 1", "status"] == "missing"
    board = found.leaderboard
    assert len(board) == 8  # anil on 1 shot is gone, diverging has come
    diverging = board.set_index("algorithm").loc["diverging"]
    assert (diverging["failed"], diverging["diverged"], scoreless(diverging)) == (1, 1, "diverged")
    less = board[board["failed"] > board["diverged"]]
    assert [(row["label"], lost(row)) for _, row in less.iterrows()] == [("maml", "1 failed")]
    report.write(run.folder)
    assert "(1 failed)" in (run.folder / "report.html").read_text()
    assert "without 1 failed" in (run.folder / "report.md").read_text()
    assert "**diverged**" in (run.folder / "report.md").read_text()
    assert "Without seeds that came to nothing (maml: 1 failed)" in (
        (run.folder / "table.tex").read_text()
    )


# Documents


def test_the_command_asks_for_the_same_sweep(run: Run) -> None:
    sweep = tables.read(run).sweep
    assert sweep is not None
    command = report.reproduction(sweep)
    assert command.startswith("python -m bench run --algos maml,anil,reptile --datasets glyphs")
    assert "--shots 1,5 --seeds 0,1 --devices cpu" in command
    assert "--set iterations=80 --set meta_clip=10.0" in command


def test_the_command_comes_to_the_same_cells(bench, tmp_path: Path, monkeypatch) -> None:
    sweep = tables.read(swept(tmp_path / "run")).sweep
    assert sweep is not None
    asked: list[str] = []
    monkeypatch.setattr("bench.runner.check", lambda cells, *_: asked.extend(c.id for c in cells))
    monkeypatch.setattr("bench.runner.estimate_seconds", lambda cells, *_: dict.fromkeys(asked, 0))
    words = shlex.split(report.reproduction(sweep))
    assert bench(*words[3:], "--dry-run")[0] == 0
    assert asked == [cell.id for cell in sweep.cells()]


def test_a_point_of_a_sweep_that_was_not_reached_is_missing(tmp_path: Path) -> None:
    faults = tables.read(swept(tmp_path / "run")).faults
    assert set(faults["status"]) == {"missing"}
    assert len(faults) == 6
    assert "maml glyphs 5-way 1-shot seed 0 (inner_lr 10, norm single)" in set(faults["cell"])


def test_markdown_and_latex_say_which_interval_and_hide_no_difference(run: Run) -> None:
    add(run, cell_of("re_ptile|<b>", shots=5, train_shots=9))
    report.write(run.folder)
    markdown = (run.folder / "report.md").read_text()
    assert "over seeds it speaks of the algorithm, trained again" in markdown
    assert "over 2 seeds" in markdown
    assert f"over {EPISODES} episodes" in markdown
    assert "| train shots |" in markdown
    assert "| samples a step | gradients a step |" in markdown
    assert r"re\_ptile\|&lt;b&gt;" in markdown
    latex = (run.folder / "table.tex").read_text()
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 2
    assert r"over 2 seeds (the algorithm, trained again, on these test episodes)" in latex
    assert r"re\_ptile|\textless{}b\textgreater{} & 9" in latex
    rows = re.findall(r"^.*&.*$", latex[: latex.index("sinusoid")], re.MULTILINE)
    assert len({row.count(" & ") for row in rows}) == 1
    assert r"$\mathbf{" in latex


def test_markdown_fits_a_comment_whatever_the_run(run: Run) -> None:
    found = tables.read(run)
    many = pd.concat([found.leaderboard] * 300, ignore_index=True)
    faults = pd.DataFrame([("x" * 80, "failed", "y" * 80)] * 500, columns=found.faults.columns)
    big = tables.Tables(
        many, found.adaptation, found.learning, found.growth, found.sensitivity, faults, None
    )
    text = paper.markdown("big", big, [], ["note " * 20] * 500, "")
    assert len(text) < 65_536
    assert "and 2,300 more rows" in text


def test_latex_names_what_has_no_score(run: Run) -> None:
    for seed in (0, 1):
        run.fail(cell_of("boil", seed), "it diverged", 3)
    run.fail(cell_of("cavia", shots=5, train_shots=5), "no memory")
    add(run, cell_of("cavia"), level=0.5)
    report.write(run.folder)
    latex = (run.folder / "table.tex").read_text()
    assert re.search(r"^boil .*& diverged & -- ", latex, re.MULTILINE)
    assert re.search(r"^cavia .*\$ & failed ", latex, re.MULTILINE)


def test_latex_marks_intervals_over_episodes_in_a_table_of_both(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.cells.mkdir(parents=True)
    for algorithm in LEVELS:
        for seed in (0, 1, 2):
            add(run, cell_of(algorithm, seed))
        add(run, cell_of(algorithm, shots=5, train_shots=5))
    found = tables.read(run)
    latex = paper.latex(found, [])
    assert "one seed, interval over test episodes" in latex
    assert latex.count("^\\dagger$ ") == len(LEVELS)


def test_what_failed_makes_no_settings_unlike(run: Run) -> None:
    for seed in (0, 1):
        cell = cell_of("boil", seed, hyperparameters={"inner_steps": 1, "engine": "auto"})
        run.fail(cell, "it diverged", 3)
    board = tables.read(run).leaderboard
    assert "engine" not in tables.varying(board)
    assert not any("engine" in names for names in tables.unlike(board).values())


def test_an_algorithm_without_inner_steps_stands_beside_those_with_them(
    bench, tmp_path: Path
) -> None:
    assert bench("run", "--algos", "maml,protonet", *QUICK, "--out", "r")[0] == 0
    assert bench("report", "r")[0] == 0
    found = tables.read(Run(tmp_path / "r"))
    growth = found.growth.groupby("entry")["step"].agg(list)
    (maml,) = found.leaderboard.index[found.leaderboard["algorithm"] == "maml"]
    assert growth.to_dict() == {maml: [1, 2, 4, 8]}
    page = (tmp_path / "r" / "report.html").read_text()
    assert "inner steps 1 (of those that have any)" in page
    assert "inner_steps" not in tables.varying(found.leaderboard)


def test_latex_escapes() -> None:
    assert paper.tex(r"50%_a & b\c^~{}$#") == (
        r"50\%\_a \& b\textbackslash{}c\textasciicircum{}\textasciitilde{}\{\}\$\#"
    )


def test_a_verdict_names_the_leader_and_what_it_is_told_apart_from(run: Run) -> None:
    found = tables.read(run)
    comparison = report.compared_pairs(found, [])
    tasks = findings.tasks(found.leaderboard)
    sinusoid = next(task for task in tasks if task.name == "sinusoid, 10-shot")
    verdict = findings.verdict(sinusoid, comparison.rows)
    assert verdict.leader == "anil"
    assert verdict.lines == ["Better than maml."]


def test_everything_is_written_whole(run: Run) -> None:
    written = report.write(run.folder)
    names = {path.name for path in written}
    assert {"report.html", "report.md", "table.tex", "comparison.csv"} <= names
    for name in (
        "accuracy",
        "adaptation",
        "learning",
        "learning_seconds",
        "cost",
        "memory",
        "memory_steps",
    ):
        assert {f"{name}.png", f"{name}.svg"} <= names
    assert all(path.stat().st_size > 500 for path in written)
    assert not list(run.folder.rglob("*.part"))


def test_the_page_asks_the_network_for_nothing(run: Run) -> None:
    report.write(run.folder)
    page = (run.folder / "report.html").read_text()
    assert len(page) < 2.5e6
    markup = page[: page.index('id="plotly"')]
    assert not re.search(r'(src|href)="(?!#|data:)', markup)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None
    assert "default-src 'none'" in policy[1].replace("&#39;", "'")
    assert "unsafe-eval" not in policy[1]
    assert "http" not in policy[1]


def test_what_all_tasks_say_together_stands_in_every_document(run: Run) -> None:
    for algorithm in LEVELS:  # a third setting, so that three algorithms are ranked over three
        for seed in (0, 1):
            add(run, cell_of(algorithm, seed, ways=10), level=0.5)
    shutil.rmtree(run.cells / cell_of("maml", dataset="sinusoid", shots=10).id)
    shutil.rmtree(run.cells / cell_of("anil", dataset="sinusoid", shots=10).id)
    report.write(run.folder)
    page = (run.folder / "report.html").read_text()
    markdown = (run.folder / "report.md").read_text()
    for text in (page, markdown):
        assert "mean ranks over 3 settings" in text
        assert "interquartile mean over 3 settings and 2 seeds" in text
    assert '<img class="ranks" src="data:image/svg+xml;base64,' in page


def test_a_time_stands_beside_its_spread(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.cells.mkdir()
    add(run, cell_of("maml"))
    (record,) = run.records()
    path = run.cells / record.cell.id / "cell.json"
    written = json.loads(path.read_text())
    written["figures"] |= {"step_ms_iqr": 1.234, "matmul_share": 0.25}
    del written["files"], written["sha256"]  # else it would be found to be changed
    path.write_text(json.dumps(written))
    report.write(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert f">{record.figures['step_ms']:.1f} (1.2)</td>" in page
    assert ">25.0</td>" in page
    assert "Energy of a step" not in page  # measured nowhere
    assert f"{record.figures['step_ms']:.1f} (1.2) |" in (tmp_path / "report.md").read_text()


def test_a_run_with_nothing_complete_has_a_report(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.cells.mkdir()
    run.fail(cell_of("diverging"), "diverged", 3)
    report.write(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "diverged" in page
    assert "Not here: 1 diverged" in page


def test_one_cell_has_a_report(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.cells.mkdir()
    add(run, cell_of("maml"))
    report.write(tmp_path)
    assert "there is nothing to compare" in (tmp_path / "report.html").read_text()


def test_the_command_reports_on_a_real_run(bench, tmp_path: Path) -> None:
    assert bench("run", "--algos", "maml,diverging", *QUICK, "--out", "r")[0] == 1
    status, out, err = bench("report", "r")
    assert (status, err) == (0, "")
    assert "r/report.html" in out
    assert "diverged: the loss is nan" in (tmp_path / "r" / "report.html").read_text()


@pytest.mark.parametrize("make", [False, True])
def test_no_run_is_one_line_and_status_2(bench, tmp_path: Path, make: bool) -> None:
    if make:
        (tmp_path / "absent").mkdir()
    status, out, err = bench("report", "absent")
    assert (status, out) == (2, "")
    assert err == "bench: absent is not a run: it has neither cells nor a sweep.toml\n"
    assert list((tmp_path / "absent").glob("*")) == []


# The page in a browser

CHROMIUM = next(
    (
        path
        for name in (os.environ.get("BENCH_CHROMIUM", ""), "chromium", "google-chrome")
        if name and (path := shutil.which(name))
    ),
    None,
)
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None and os.environ.get("BENCH_BROWSER_TESTS") != "required",
    reason="no Chromium: 'apt-get install chromium' or BENCH_CHROMIUM=PATH enables this test",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with every kind of trouble in it."""
    run = sample(tmp_path_factory.mktemp("report") / "<i>run")
    add(run, cell_of("<script>alert(1)</script>", seed=3))
    add(run, cell_of("reptile", dataset="<b>&", eval_steps=30), level=0.5)
    add(run, cell_of("maml", dataset="<b>&"), level=0.6)
    run.fail(cell_of("diverging"), "Traceback\n<img src=x onerror=alert(1)>: nan")
    return report.write(run.folder)[0]


@pytest.fixture
def page(browser, troubled: Path) -> Iterator[Any]:
    """The report, open, and quiet to the end."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(120_000)  # for machines that are busy with more than this
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(f"dialog {dialog.message}"))
    page.on("request", lambda r: r.url.startswith("http") and said.append(f"asked {r.url}"))
    page.goto(troubled.as_uri())
    page.wait_for_selector("html[data-ready]")
    yield page
    assert said == []
    page.close()


def shown(page) -> list[str]:
    """The algorithms of the leaderboard's rows that can be seen, from the top."""
    return page.locator("#leaderboard tbody tr:visible th").all_inner_texts()


@needs_browser
def test_the_leaderboard_sorts_by_mouse_and_by_keyboard(page) -> None:
    header = page.locator("#leaderboard th", has_text="Algorithm")
    header.get_by_role("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    assert shown(page) == sorted(shown(page), key=str.lower)
    header.get_by_role("button").press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert shown(page) == sorted(shown(page), key=str.lower, reverse=True)

    step = page.locator("#leaderboard th", has_text="Meta-step, ms")
    step.get_by_role("button").focus()
    page.keyboard.press("Space")
    assert step.get_attribute("aria-sort") == "ascending"
    assert header.get_attribute("aria-sort") is None
    assert shown(page)[-1] == "diverging"  # nothing was measured: last, whichever way
    page.keyboard.press("Space")
    assert shown(page)[-1] == "diverging"


@needs_browser
def test_the_leaderboard_filters(page) -> None:
    everything = len(shown(page))
    page.get_by_label("Dataset").select_option("sinusoid")
    assert shown(page) == ["anil", "maml"]
    assert page.get_by_role("status").inner_text() == f"2 of {everything} rows"
    page.get_by_label("Dataset").select_option("")
    page.get_by_label("Shots").select_option("5")
    assert len(shown(page)) == 3
    page.get_by_label("Algorithm").fill("REP")
    assert shown(page) == ["reptile"]


@needs_browser
def test_every_chart_is_drawn_for_every_task(page) -> None:
    tasks = page.get_by_label("Task", exact=True)
    for index in range(tasks.locator("option").count()):
        tasks.select_option(str(index))
        for name in ("scores", "adaptation", "learning", "growth", "cost"):
            chart = page.locator(f"#chart-{name}")
            assert chart.locator(".scatterlayer .trace").count() > 1
            assert tasks.locator("option").nth(index).inner_text() in chart.get_attribute(
                "aria-label"
            )
    page.get_by_label("Against", exact=True).select_option("seconds")
    assert "seconds of training" in page.locator("#chart-learning").inner_text()
    page.get_by_label("Score on", exact=True).select_option("training")
    assert "training" in page.locator("#chart-learning .ytitle").text_content()
    page.get_by_label("Cost", exact=True).select_option("peak_memory_bytes")
    assert "MiB" in page.locator("#chart-cost").inner_text()


@needs_browser
def test_every_chart_has_its_numbers_as_a_table(page) -> None:
    page.get_by_label("Task", exact=True).select_option(label="glyphs, 5-way 1-shot")
    for name in ("scores", "adaptation", "learning", "growth", "cost"):
        page.locator(f"#numbers-{name} summary").press("Enter")
        table = page.locator(f"#numbers-{name} table")
        table.wait_for()
        assert table.locator("tbody tr").count() >= 4
        assert "maml" in table.inner_text()
    assert "yes" in page.locator("#numbers-cost table").inner_text()


@needs_browser
def test_the_sensitivity_is_charted_where_something_was_swept(
    browser, page, tmp_path: Path
) -> None:
    assert page.locator("#chart-sensitivity").count() == 0
    path = report.write(swept(tmp_path / "run").folder)[0]
    assert (path.parent / "figures" / "sensitivity.svg").is_file()
    other = browser.new_page()
    said: list[str] = []
    other.on("console", lambda message: said.append(message.text))
    other.on("pageerror", lambda error: said.append(str(error)))
    other.goto(path.as_uri())
    other.wait_for_selector("html[data-ready]")
    chart = other.locator("#chart-sensitivity")
    kind = "document.getElementById('chart-sensitivity').layout.xaxis.type"
    assert other.evaluate(kind) == "log"
    assert chart.locator(".scatterlayer .trace .errorbar").count() == 3 * 2 * 3
    assert chart.locator(".xtick").all_text_contents() == ["0.01", "0.1", "1"]
    other.locator("#numbers-sensitivity summary").press("Enter")
    table = other.locator("#numbers-sensitivity table")
    table.wait_for()
    assert table.locator("tbody tr").count() == 18
    assert "maml (norm single)" in table.inner_text()
    other.get_by_label("Setting", exact=True).select_option("norm")
    assert other.evaluate(kind) == "category"
    assert chart.locator(".xtick").all_text_contents() == ["single", "support"]
    assert "maml (inner_lr 0.01)" in table.inner_text()
    assert said == []
    other.close()


@needs_browser
def test_differences_are_those_of_the_chosen_task(page) -> None:
    page.get_by_label("Task", exact=True).select_option(label="sinusoid, 10-shot")
    matrix = page.locator("table.matrix:visible")
    assert matrix.count() == 1
    assert matrix.locator("tbody th").all_inner_texts() == ["anil", "maml"]
    better = matrix.locator("td.better")
    assert better.count() == 1
    assert better.inner_text().startswith("−0.0")  # the lower error is the better one
    assert "▲" in better.inner_text()


@needs_browser
def test_what_comes_from_data_is_text(page) -> None:
    assert "<script>alert(1)</script>" in shown(page)
    assert page.locator("#faults ~ div img").count() == 0
    page.get_by_label("Task", exact=True).select_option(label="<b>&, 5-way 1-shot")
    page.get_by_label("Task", exact=True).select_option(label="glyphs, 5-way 1-shot")
    assert "<script>alert(1)</script>" in page.locator("#chart-scores").inner_text()


@needs_browser
def test_no_name_runs_or_becomes_markup(browser, tmp_path: Path) -> None:
    run = nasty(tmp_path / "run")
    found = tables.read(run)
    comparison = report.compared_pairs(found, [])
    path = tmp_path / "report.html"
    path.write_text(report.page(run.folder, found, comparison))
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))  # a refusal of the policy too
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(f"dialog {dialog.message}"))
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]")
    assert set(NASTY) <= set(shown(page))
    assert page.locator("img, iframe, object, embed, a[href^=javascript]").count() == 0
    assert page.locator("script").count() == 4  # data, Plotly packed, our own, Plotly unpacked
    tasks = page.get_by_label("Task", exact=True)
    for index in range(tasks.locator("option").count()):
        tasks.select_option(str(index))
        for name in ("scores", "adaptation", "learning", "growth", "cost"):
            assert page.locator(f"#chart-{name} .scatterlayer .trace").count() > 1
        for name in NASTY:
            assert name in page.locator("#chart-scores").inner_text()
    tasks.select_option(label="glyphs, 5-way 1-shot")
    ticks = page.locator("#chart-sensitivity .xtick").all_text_contents()
    assert set(ticks) <= set(NASTY)
    assert len(ticks) > 1
    assert said == []
    page.close()


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (1280, "dark")])
def test_nothing_overflows_and_axe_finds_no_fault(page, width: int, scheme: str) -> None:
    import axe_playwright_python

    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    for details in page.locator("summary:visible").all():
        details.click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert min(page.locator(".svg-container").evaluate_all("e => e.map(x => x.offsetHeight)")) > 100
    axe = Path(axe_playwright_python.__file__).with_name("axe.min.js")
    page.evaluate(axe.read_text())
    faults = page.evaluate("axe.run()")["violations"]
    assert [(fault["id"], fault["nodes"][0]["html"]) for fault in faults] == []


@needs_browser
def test_the_keyboard_reaches_everything_and_shows_where_it_is(page) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the leaderboard"
    reached = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        if page.evaluate("document.activeElement !== document.body"):
            assert page.evaluate(outline) != "none"
    assert {"task", "learning-x", "learning-of", "cost-x", "BUTTON", "SUMMARY"} <= reached


def test_a_leader_that_another_beats_on_their_seeds_is_no_leader_alone(run: Run) -> None:
    found = tables.read(run)
    comparison = report.compared_pairs(found, [])
    task = next(t for t in findings.tasks(found.leaderboard) if t.name == "sinusoid, 10-shot")
    (row,) = findings.pairs(task, comparison.rows)
    turned = [replace(row, better="maml")]
    assert findings.verdict(task, turned).lines == ["Worse than maml on the seeds that both have."]
    assert findings.level_with_best(task, turned) == ["anil", "maml"]


# Numbers, from the cells to what is shown


def of_maml(run: Run, shots: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """MAML's scores by seed, episode and step, and its means by seed."""
    cells = [cell_of("maml", seed, shots=shots, train_shots=shots) for seed in (0, 1)]
    scores = np.stack([run.scores_by_step(cell) for cell in cells])
    return scores, scores[:, :, -1].mean(axis=1)


def half_over_seeds(means: np.ndarray) -> float:
    return float(stats.t.ppf(0.975, len(means) - 1) * means.std(ddof=1) / len(means) ** 0.5)


def test_the_headline_interval_is_over_seeds_and_costs_are_medians(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.cells.mkdir(parents=True)
    for seed, time in enumerate((10.0, 1.0, 4.0)):
        add(run, cell_of("maml", seed), step_ms=time)
    row = tables.read(run).leaderboard.iloc[0]
    assert row["step_ms"] == 4.0
    means = np.array([record.figures["mean"] for record in run.records()])
    assert row["low"] == pytest.approx(means.mean() - half_over_seeds(means))
    assert row["high"] == pytest.approx(means.mean() + half_over_seeds(means))


def test_curves_are_means_of_the_seeds_with_what_they_say_their_bands_are(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.cells.mkdir(parents=True)
    for seed, level in ((0, 0.5), (1, 0.9)):
        add(run, cell_of("maml", seed), level=level)
    found = tables.read(run)
    training = found.learning.query("of == 'training'")
    assert training["mean"].to_numpy() == pytest.approx(0.7)
    assert training["low"].to_numpy() == pytest.approx(0.5)
    assert training["high"].to_numpy() == pytest.approx(0.9)
    # Peaks are 5 + seed + steps MiB.
    assert found.growth[["step", "mean", "low", "high"]].to_numpy().tolist() == [
        [steps, 5.5 + steps, 5 + steps, 6 + steps] for steps in (1, 2, 4, 8)
    ]
    scores, _ = of_maml(run)
    together = scores.mean(axis=0)
    half = stats.t.ppf(0.975, EPISODES - 1) * together.std(axis=0, ddof=1) / EPISODES**0.5
    assert found.adaptation["mean"].to_numpy() == pytest.approx(together.mean(axis=0))
    assert (found.adaptation["high"] - found.adaptation["mean"]).to_numpy() == pytest.approx(half)
    assert (found.adaptation["mean"] - found.adaptation["low"]).to_numpy() == pytest.approx(half)


def test_documents_show_the_score_its_interval_over_seeds_and_the_costs(run: Run) -> None:
    _, means = of_maml(run)
    mean, half = 100 * means.mean(), 100 * half_over_seeds(means)
    report.write(run.folder)
    markdown = (run.folder / "report.md").read_text()
    (row,) = re.findall(r"^\| glyphs, 5-way 1-shot \| maml \|.*$", markdown, re.MULTILINE)
    assert f"| {mean:.1f} ± {half:.1f}% over 2 seeds |" in row
    assert row.endswith("| 51.5 | 4 |")  # the name's letters decide what it costs
    latex = (run.folder / "table.tex").read_text()
    assert f"$\\mathbf{{{mean:.1f}}} \\pm {half:.1f}$" in latex
    page = (run.folder / "report.html").read_text()
    assert f"{mean:.1f}" in page
    found = tables.read(run)
    said = findings.verdict(findings.tasks(found.leaderboard)[0], [])
    assert said.score == f"{mean:.1f} ± {half:.1f}% over 2 seeds"


def test_charts_have_their_numbers_in_the_units_that_are_shown(run: Run) -> None:
    found = tables.read(run)
    data = report._chart_data(found, findings.tasks(found.leaderboard))
    scores, means = of_maml(run)
    (entry,) = (e for e in data["entries"] if (e["label"], e["task"]) == ("maml", 0))
    assert entry["mean"] == pytest.approx(100 * means.mean(), rel=1e-4)
    assert entry["ci_seeds"] == pytest.approx(100 * half_over_seeds(means), rel=1e-4)
    assert (entry["step_ms"], entry["peak_memory_bytes"]) == (pytest.approx(51.5), 4)
    points = pd.DataFrame(**{"data": data["adaptation"]["rows"], "columns": CURVE_COLUMNS})
    mine = points[points["entry"] == entry["entry"]]
    assert mine["mean"].to_numpy() == pytest.approx(100 * scores.mean(axis=(0, 1)), rel=1e-4)
    grown = pd.DataFrame(**{"data": data["growth"]["rows"], "columns": CURVE_COLUMNS})
    assert grown[grown["entry"] == entry["entry"]]["mean"].tolist() == [6.5, 7.5, 9.5, 13.5]


def test_the_leaderboard_of_the_page_shows_both_half_widths(run: Run) -> None:
    found = tables.read(run)
    shown = report._leaderboard(found, findings.tasks(found.leaderboard))
    titles = [column.title for column in shown["columns"]]
    row = next(r["cells"] for r in shown["rows"] if r["cells"][0].text.startswith("maml"))
    scores, means = of_maml(run)
    episodes = scores[:, :, -1].mean(axis=0)
    over_episodes = stats.t.ppf(0.975, EPISODES - 1) * episodes.std(ddof=1) / EPISODES**0.5
    texts = [cell.text for cell in row]
    assert len(titles) == len(texts)
    assert f"{100 * means.mean():.1f} %" in texts
    assert f"{100 * half_over_seeds(means):.1f}" in texts
    assert f"{100 * over_episodes:.1f}" in texts


def test_a_difference_is_row_minus_column_with_its_interval(run: Run) -> None:
    found = tables.read(run)
    comparison = report.compared_pairs(found, [])
    task = findings.tasks(found.leaderboard)[0]
    rows = findings.pairs(task, comparison.rows)
    matrix = report._matrix(task, rows)
    at = {
        (line["label"], column): cell
        for line in matrix["rows"]
        for column, cell in zip(matrix["labels"], line["cells"], strict=True)
    }
    for row in rows:
        for one, other, sign in (
            (row.algorithm_a, row.algorithm_b, 1),
            (row.algorithm_b, row.algorithm_a, -1),
        ):
            cell = at[one, other]
            plain = cell["text"].replace("\N{MINUS SIGN}", "-").split()[0]
            assert float(plain) == pytest.approx(100 * sign * row.difference, abs=0.06)
            ends = cell["interval"].replace("\N{MINUS SIGN}", "-")[1:-1].split(", ")
            expected = sorted((100 * sign * row.low, 100 * sign * row.high))
            assert [float(end) for end in ends] == pytest.approx(expected, abs=0.06)
