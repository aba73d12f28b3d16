"""The command line as a user meets it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from bench import measure, runner
from bench.cli import main
from bench.naming import said
from bench.store import SUMMARY_COLUMNS, Run
from bench.sweep import Sweep
from tests.bench.conftest import QUICK, TINY, measured_here

ROOT = Path(__file__).resolve().parents[2]


def start(*arguments: str, cwd: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "bench", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_sweep_ends_in_a_table_a_plot_and_a_folder_of_results(bench, tmp_path: Path) -> None:
    status, out, err = bench("run", "--algos", "maml,reptile", "--shots", "1,2", *QUICK)
    assert (status, err) == (0, "")
    assert "± is the 95% interval over test episodes" in out
    (folder,) = (tmp_path / "results").iterdir()
    summary = pd.read_csv(folder / "summary.csv")
    assert tuple(summary.columns) == SUMMARY_COLUMNS
    assert len(summary) == 4
    assert set(summary["status"]) == {"complete"}
    assert summary["mean"].between(0.2, 1).all()
    assert (summary["step_ms"] > 0).all()
    assert (summary["step_gflops"] > 0).all()
    for cell_id in summary["cell_id"]:
        assert sorted(path.name for path in (folder / "cells" / cell_id).iterdir()) == [
            "cell.json",
            "checkpoint.safetensors",
            "episodes.parquet",
            "performance.parquet",
            "training.parquet",
        ]
    assert (folder / "figures" / "accuracy.png").stat().st_size > 5_000
    assert (folder / "figures" / "accuracy.svg").read_text().startswith("<?xml")
    assert (folder / "environment.json").exists()

    # The same command again has nothing to do, and a sweep.toml asks for the same run.
    status, again, _ = bench("run", "--algos", "maml,reptile", "--shots", "1,2", *QUICK)
    assert status == 0
    assert "4 of 4 cells are done already" in again
    status, out, _ = bench("run", "--config", str(folder / "sweep.toml"), "--plugin", str(TINY))
    assert status == 0
    assert "4 of 4 cells are done already" in out


def test_a_swept_hyperparameter_tells_rows_apart_everywhere(bench, tmp_path: Path) -> None:
    arguments = ("--algos", "maml", "--set", "inner_lr=0.05,0.4", *QUICK, "--out", "r")
    status, out, _ = bench("run", *arguments)
    assert status == 0
    assert "maml tiny 5-way 1-shot seed 0 (inner_lr 0.05): " in out
    assert re.search(r"maml +tiny 5w1s +0\.05 ", out)
    summary = pd.read_csv(tmp_path / "r" / "summary.csv")
    assert tuple(summary.columns) == (*SUMMARY_COLUMNS, "inner_lr")
    assert summary["inner_lr"].tolist() == [0.05, 0.4]
    status, out, _ = bench("run", "--config", "r/sweep.toml", "--plugin", str(TINY), "--out", "r")
    assert "2 of 2 cells are done already" in out
    status, out, _ = bench("compare", "r")
    assert "maml (inner_lr 0.05)" in out
    assert "inner_lr 0.05 / 0.4" in out
    # Each algorithm is in a group once: a sweep does not multiply the processes.
    run = Run(tmp_path / "r")
    sessions = [
        pd.read_parquet(run.cells / cell / "performance.parquet")["session"].iloc[0]
        for cell in run.cell_ids()
    ]
    assert len(set(sessions)) == 2


@pytest.mark.parametrize(("precision", "said"), [("bf16", True), ("float32", False)])
def test_a_precision_that_is_not_float32_is_said(
    bench, unmeasured: None, precision: str, said: bool
) -> None:
    asked = ("--algos", "maml", "--set", f"precision={precision}", *QUICK, "--out", "r")
    status, out, _ = bench("run", *asked)
    assert status == 0
    assert (f"precision {precision}" in " ".join(out.split())) == said
    assert pd.read_csv("r/summary.csv")["precision"].tolist() == [precision]


def test_algorithms_are_scored_on_the_same_episodes_and_timed_in_turns(
    bench, fresh_processes, tmp_path: Path
) -> None:
    bench("run", "--algos", "maml,fomaml", *QUICK, "--out", "r")
    run = Run(tmp_path / "r")
    records = run.records()
    assert len({record.figures["episode_address"] for record in records}) == 1
    sessions = [
        pd.read_parquet(run.cells / record.cell.id / "performance.parquet")["session"].unique()
        for record in records
    ]
    assert sessions[0].tolist() == sessions[1].tolist()


def test_gradients_are_verified_after_training_where_asked(bench, tmp_path: Path) -> None:
    asked = ("--verify-gradients", "--checkpoint-inner", "--tasks-per-pass", "1")
    status, out, err = bench("run", "--algos", "maml", *QUICK, *asked, "--out", "r")
    assert (status, err) == (0, "")
    (row,) = pd.read_csv(tmp_path / "r" / "summary.csv").to_dict("records")
    assert 0 < row["gradient_error"] < 1e-10
    said = "after training, gradients of 1 cell are within "
    assert float(out.split(said)[1].split()[0]) == pytest.approx(row["gradient_error"], rel=0.1)
    (record,) = Run(tmp_path / "r").records()
    own = record.cell.hyperparameters
    assert (own["checkpoint_inner"], own["tasks_per_pass"]) == (True, 1)
    again = bench("run", "--algos", "maml", *QUICK, *asked, "--out", "r")
    assert "note:  1 cells are there already, and are not verified" in again[1]


def test_a_terminal_for_ascii_alone_ends_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "list", "datasets"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"glyphs" in done.stdout


def test_a_dry_run_says_what_diverges_and_what_is_there(bench, tmp_path: Path) -> None:
    run = ("run", "--algos", "maml", *QUICK, "--out", "r")
    assert bench(*run)[0] == 0
    status, out, _ = bench(*run, "--set", "inner_lr=0.1,1e18", "--dry-run")
    assert status == 0
    assert "diverges" in out
    status, out, _ = bench(*run, "--dry-run")
    assert "1 of 1 cells are there already" in out
    assert "0 cells, about 0.0 minutes" in out


def test_a_dry_run_prints_the_cells_and_writes_nothing(bench, tmp_path: Path) -> None:
    status, out, _ = bench("run", "--algos", "maml", "--shots", "1,2", *QUICK, "--dry-run")
    assert status == 0
    assert "2 cells, about" in out
    assert list(tmp_path.iterdir()) == []


def test_a_training_that_diverges_is_shown_as_such_and_left_out(bench, tmp_path: Path) -> None:
    status, out, _ = bench("run", "--algos", "diverging,maml,fomaml", *QUICK, "--out", "r")
    assert status == 1
    assert "seed 0 failed: diverged: the loss is nan at iteration 1" in out
    assert re.search(r"diverging +tiny 5w1s .*diverged at 1", out)
    summary = pd.read_csv(tmp_path / "r" / "summary.csv").set_index("algorithm")
    assert summary["status"].to_dict() == {
        "maml": "complete",
        "fomaml": "complete",
        "diverging": "diverged",
    }
    assert summary.loc["diverging", "diverged_at"] == 1
    assert pd.isna(summary.loc["diverging", "mean"])
    assert "left out: diverging (1 diverged)" in (
        (tmp_path / "r" / "figures" / "accuracy.svg").read_text()
    )
    _, out, _ = bench("compare", "r")
    assert "1 comparison on" in out
    left_out = "diverging tiny 5-way 1-shot seed 0 (diverged at iteration 1) in r"
    assert f"left out, for they have no score: {left_out}" in out


def test_what_goes_wrong_in_a_cell_is_noted_the_others_go_on_and_it_is_let_be_until_asked_for(
    bench, tmp_path: Path, unmeasured, monkeypatch
) -> None:
    asked = ("run", "--algos", "raising,leaving,greedy,hazy,maml", *QUICK, "--out", "r")
    assert bench(*asked)[0] == 1
    summary = pd.read_csv(tmp_path / "r" / "summary.csv").set_index("algorithm")
    assert summary.loc["maml", "status"] == "complete"
    assert set(summary.drop("maml")["status"]) == {"failed"}
    reasons = {
        f["settings"]["algorithm"]: f["reason"] for f in Run(tmp_path / "r").failures().values()
    }
    assert "KeyError: 'no such key'" in reasons["raising"]
    assert "SystemExit: 3" in reasons["leaving"]
    assert "RuntimeError" in reasons["greedy"]
    assert "memory" in reasons["greedy"]
    assert "the loss is not finite after adapting to episode 0" in reasons["hazy"]

    status, again, _ = bench(*asked)
    assert status == 1
    assert "4 of 5 cells failed before; --retry-failed does them again" in again
    assert "seed 0 failed:" not in again

    monkeypatch.setenv("MENDED", "raising")
    status, retried, _ = bench(*asked, "--retry-failed")
    assert status == 1
    assert retried.count("seed 0 failed:") == 3
    assert {f["settings"]["algorithm"] for f in Run(tmp_path / "r").failures().values()} == {
        "leaving",
        "greedy",
        "hazy",
    }


def test_an_algorithm_that_fails_when_it_is_tried_out_is_named(bench, tmp_path: Path) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        "import algorithms\n\n"
        "@algorithms.register('unfinished')\n"
        "class Unfinished(algorithms.get('maml')):\n"
        "    def meta_gradient(self, tasks):\n"
        "        raise KeyError('no such key')\n"
    )
    asked = ("run", *QUICK, "--plugin", str(plugin), "--algos", "unfinished", "--out", "r")
    status, _, err = bench(*asked)
    assert (status, err.count("\n")) == (2, 1)
    tried = "when unfinished tiny 5-way 1-shot seed 0 was tried out"
    assert f"KeyError: 'no such key' (plugin.py:6), {tried}" in err
    assert not (tmp_path / "r").exists()


def test_a_damaged_cell_is_made_again(bench, tmp_path: Path) -> None:
    bench("run", "--algos", "maml", *QUICK, "--out", "r")
    (cell,) = (tmp_path / "r" / "cells").iterdir()
    before = pd.read_parquet(cell / "episodes.parquet")
    (cell / "cell.json").write_text("{")
    status, _, _ = bench("run", "--algos", "maml", *QUICK, "--out", "r")
    assert status == 0
    assert pd.read_parquet(cell / "episodes.parquet").equals(before)


def test_cells_of_changed_code_are_not_mixed_in_silence(bench, tmp_path: Path, monkeypatch) -> None:
    bench("run", "--algos", "maml", *QUICK, "--out", "r")
    monkeypatch.setattr("bench.runner.source_hash", lambda plugin: "other")
    arguments = ("run", "--algos", "maml,fomaml", *QUICK, "--out", "r")
    for dry in ((), ("--dry-run",)):
        status, _, err = bench(*arguments, *dry)
        assert status == 2
        assert "cells made by different source code" in err
    assert bench(*arguments, "--accept-changed-code")[0] == 0


LONG_ENOUGH_TO_CUT = ("run", "--algos", "maml", *QUICK, "--iterations", "400")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_subject", measured_here)
        assert main([*LONG_ENOUGH_TO_CUT, "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    bench, tmp_path: Path, undisturbed: Path, stop: int
) -> None:
    arguments = LONG_ENOUGH_TO_CUT
    process = start(*arguments, "--out", "cut", cwd=tmp_path)
    cells = tmp_path / "cut" / "cells"
    deadline = time.monotonic() + 240
    while not list(cells.glob(".*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(stop)
    out, err = process.communicate()
    assert process.returncode == 130
    assert "stopping at the next safe point; once more stops at once" in err
    assert "the same command goes on from here" in out
    assert not Run(tmp_path / "cut").records()
    assert bench(*arguments, "--out", "cut")[0] == 0
    (whole,), (cut,) = Run(undisturbed).records(), Run(tmp_path / "cut").records()
    assert cut.figures["mean"] == whole.figures["mean"]
    for name in ("episodes.parquet", "checkpoint.safetensors"):
        runs = (undisturbed, tmp_path / "cut")
        files = [run / "cells" / whole.cell.id / name for run in runs]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_that_is_interrupted_while_it_measures_has_only_that_to_do_again(
    bench, tmp_path: Path
) -> None:
    arguments = ("run", "--algos", "maml", *QUICK, "--out", "cut")
    process = start(*arguments, cwd=tmp_path)
    cells = tmp_path / "cut" / "cells"
    deadline = time.monotonic() + 240
    while not (trained := list(cells.glob(".*/trained.json"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate()
    assert process.returncode == 130
    assert "the same command goes on from here" in out
    figures = json.loads(trained[0].read_text())["figures"]
    assert bench(*arguments)[0] == 0
    (record,) = Run(tmp_path / "cut").records()
    assert record.figures["train_seconds"] == figures["train_seconds"]
    assert record.figures["step_ms"] > 0


def test_what_interrupts_a_run_once_all_is_done_takes_nothing_from_it(
    bench, tmp_path: Path, monkeypatch
) -> None:
    complete = runner._complete

    def late(*arguments: Any) -> None:
        complete(*arguments)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(runner, "_complete", late)
    status, out, _ = bench("run", "--algos", "maml", *QUICK, "--out", "r")
    assert status == 0
    assert (tmp_path / "r" / "figures" / "accuracy.png").exists()
    assert "interrupted" not in out
    # With cells to come it ends the run before the next of them.
    status, out, _ = bench("run", "--algos", "maml", *QUICK, "--shots", "2,3", "--out", "r")
    assert status == 130
    assert len(Run(tmp_path / "r").records()) == 2


def test_the_version_is_said(bench) -> None:
    status, out, err = bench("--version")
    assert (status, err) == (0, "")
    assert re.fullmatch(r"fewshot-bench \d+\.\d+\.\d+\n", out)


def test_why_a_network_is_not_batched_is_said_once(bench, tmp_path: Path) -> None:
    plugin = tmp_path / "net.py"
    plugin.write_text(
        "from torch import nn\nfrom algorithms import models\n\n"
        "@models.register('gated')\n"
        "def gated(shape, outputs):\n"
        "    return nn.Sequential(nn.Flatten(), nn.PReLU(), nn.Linear(36, outputs))\n"
    )
    asked = ("--plugin", str(plugin), *QUICK[2:], "--model", "gated", "--costs", "never")
    status, out, _ = bench("run", "--algos", "maml", "--seeds", "0,1", *asked, "--out", "r")
    assert status == 0
    assert out.count("ran by engine higher: PReLU (1) ") == 1
    assert set(pd.read_csv("r/summary.csv")["engine"]) == {"higher"}
    reasons = {record.figures["engine_reason"] for record in Run(tmp_path / "r").records()}
    assert len(reasons) == 1


def test_costs_may_be_left_out(bench, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(measure, "measure", None)
    arguments = ("run", "--algos", "maml,reptile", *QUICK, "--out", "r")
    status, out, _ = bench(*arguments, "--costs", "never")
    assert status == 0
    assert "not measured" not in out
    summary = pd.read_csv(tmp_path / "r" / "summary.csv")
    assert set(summary["status"]) == {"complete"}
    assert summary[["step_ms", "peak_memory_bytes"]].isna().all(axis=None)
    assert not list(tmp_path.rglob("performance.parquet"))
    assert bench("report", "r")[0] == 0
    assert bench("compare", "r")[0] == 0
    assert bench("check", "r", "--baseline", "r")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--algos", "mamml"), "no algorithm is called 'mamml'; did you mean 'maml'?"),
        (("--ways", "1"), "--ways 1 leaves nothing to choose between: give 2 or more"),
        (("--shots", "0"), "shots: input should be greater than or equal to 1 (got 0)"),
        (("--seeds", "-1"), "seeds: input should be greater than or equal to 0 (got -1)"),
        (("--ways", "13"), "13 ways were asked for; tiny has in its train split 12 classes"),
        (("--shots", "18"), "need 23 samples a class; tiny has in its train split a class with 20"),
        (("--set", "precision=tf32"), "precision tf32 is for NVIDIA GPUs, not for cpu"),
        (("--set", "cuda_graphs=true"), "cuda_graphs is for NVIDIA GPUs, not for cpu"),
        (("--set", "precision=half"), "precision is 'half'; it must be one of float32, tf32, bf16"),
        (("--cell-timeout", "0"), "--cell-timeout is 0; it must be positive"),
        (("--devices", "cuda:7"), "there is no device 'cuda:7'; there are cpu"),
        (("--devices", "abacus"), "there is no device 'abacus'"),
        (("--devices", "cpu:0"), "there is no device 'cpu:0'; there are cpu"),
        (("--devices", "meta"), "there is no device 'meta'"),
        (("--executor", "slurm", "--cell-memory", "inf"), "--cell-memory is inf; it must be"),
        (("--norm", "layer"), "norm is 'layer'; it must be one of transductive"),
        (("--engine", "steam"), "engine is 'steam'; it must be one of auto"),
        (("--model", "resnet"), "no model is called 'resnet'"),
        (("--datasets", "omniglot", "--data-root", "nowhere"), "nowhere"),
        (("--config", "absent.toml"), "cannot read absent.toml"),
        (("--plugin", "absent.py"), "absent.py is not a Python file"),
        (("--out", "/proc/nowhere"), "cannot write to /proc/nowhere"),
        (("--iteration", "5"), "No such option: --iteration"),
        (("--set", "iner_lr=1"), "no setting 'iner_lr' of maml; did you mean 'inner_lr'?"),
        (("--set", "inner_lr=0.1,-1"), "inner_lr is -1.0; it must be positive"),
        (("--set", "inner_lr=fast"), "maml: inner-lr: input should be a valid number"),
    ],
)
def test_bad_input_ends_in_one_line_and_status_2_with_nothing_written(
    bench, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    status, out, err = bench("run", "--algos", "maml", *QUICK, *arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_left_alone(bench, tmp_path: Path) -> None:
    import filelock

    (tmp_path / "r").mkdir()
    with filelock.FileLock(tmp_path / "r" / ".lock"):
        status, _, err = bench("run", "--algos", "maml", *QUICK, "--out", "r")
    assert status == 2
    assert "is in use by another run" in err


@pytest.mark.parametrize("kind", ["algorithms", "datasets"])
def test_lists_name_everything(bench, kind: str) -> None:
    status, out, _ = bench("list", kind)
    assert status == 0
    expected = ("maml", "fomaml", "reptile", "anil")
    for name in expected if kind == "algorithms" else ("glyphs", "omniglot", "sinusoid"):
        assert name in out


def test_the_settings_that_are_listed_are_those_that_cells_get(bench) -> None:
    status, out, _ = bench("list", "settings", "--algos", "maml,reptile", "--dataset", "omniglot")
    assert status == 0
    listed = {words[0]: words[1:] for words in map(str.split, out.splitlines()[1:])}
    cells = Sweep(algos=["maml", "reptile"], datasets=["omniglot"]).cells()
    expected = [cell.row() for cell in cells]
    axes = {"algorithm", "dataset", "ways", "shots", "seed", "device"}
    assert listed.keys() == set().union(*expected) - axes
    for name, values in listed.items():
        assert values == [said(row[name]) for row in expected if name in row]


@pytest.mark.parametrize("wrong", [("--dataset", "glyphs,omniglot"), ("--algos", "mamm")])
def test_settings_of_what_is_not_there(bench, wrong: tuple[str, str]) -> None:
    status, _, err = bench("list", "settings", *wrong)
    assert status == 2
    assert err.count("\n") == 1


def test_no_arguments_are_answered_with_help_alone(bench) -> None:
    status, out, err = bench()
    assert (status, err) == (2, "")
    assert "Start with: python -m bench run" in out


def test_help_teaches(bench) -> None:
    status, out, _ = bench("run", "--help")
    assert status == 0
    assert "python -m bench run --algos maml,fomaml --shots 1,5" in out
    for option in ("--algos", "--shots", "--seeds", "--config", "--out", "--dry-run"):
        assert option in out


def test_another_package_called_datasets_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("def load_dataset(): ...\n")
    process = start("list", "datasets", cwd=tmp_path)
    out, err = process.communicate()
    assert process.returncode == 2
    assert out == ""
    assert err.count("\n") == 1
    assert "another package called 'datasets' is in the way" in err
    program = [sys.executable, "-c", "import bench.sweep"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path)
    assert "ImportError: another package called 'datasets' is in the way" in done.stderr


def test_plugins_bring_algorithms_and_datasets(bench) -> None:
    status, out, _ = bench(
        "run", "--plugin", str(TINY), "--algos", "maml", "--datasets", "tiny", *QUICK, "--dry-run"
    )
    assert status == 0
    assert "maml tiny" in out


@pytest.mark.parametrize(
    "text",
    [
        "import algorithms\nalgorithms.register('imaml')(type('Mine', (), {}))",
        "import datasets\ndatasets.register('cifar_fs')(type('Mine', (), {}))",
    ],
)
def test_a_plugin_does_not_pass_for_what_is_built_in(bench, tmp_path: Path, text: str) -> None:
    # In a process of its own, in which nothing has asked for the built-in one before.
    (tmp_path / "p.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "bench", "run", "--algos", "fomaml", "--plugin", "p.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert re.search("two (algorithms|datasets) are called", done.stderr)


def test_a_plugin_that_fails_is_named(bench, tmp_path: Path) -> None:
    plugin = tmp_path / "broken.py"
    plugin.write_text("1 / 0\n")
    status, _, err = bench("run", *QUICK, "--plugin", str(plugin))
    assert status == 2
    assert "broken.py fails: ZeroDivisionError" in err


def test_an_engine_whose_gradient_is_wrong_does_not_run(bench, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("bench.making.verify", lambda *arguments, **given: 1e-3)
    status, _, err = bench("run", "--algos", "maml", *QUICK)
    assert status == 2
    assert "maml's gradient by the batched engine is 1.0e-03 from that by higher" in err
    assert list(tmp_path.iterdir()) == []
