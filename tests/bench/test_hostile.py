"""Results folders and settings of other hands: what is damaged is named, the rest is shown, nothing
is run, and nothing is written elsewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench import comparison, paper, plots, report, tables
from bench.errors import BenchError
from bench.regression import check
from bench.store import PERFORMANCE, RECORD, SCORES, TRAINING, Run
from bench.sweep import Cell, read_sweep
from tests.bench.conftest import QUICK
from tests.bench.made_up import NASTY, add, cell_of, nasty

SOUND = [cell_of("maml", episodes=20), cell_of("anil", episodes=20)]
OTHER = cell_of("reptile", episodes=20)


def three(folder: Path) -> Run:
    """Three sound cells."""
    run = Run(folder)
    run.cells.mkdir(parents=True)
    for cell in (*SOUND, OTHER):
        add(run, cell)
    return run


def everything(run: Run) -> tuple[tables.Tables, str]:
    """All that reads a run: its tables, and what all its documents say."""
    found = tables.read(run)
    compared = comparison.compare([run.folder], accept_changed_code=True)
    run.summary()
    lines = compared.lines()
    page = report.page(run.folder, found, compared)
    documents = [page, paper.markdown("r", found, compared.rows, lines, "")]
    documents += [paper.latex(found, compared.rows), *lines]
    documents.append(check(run.folder, run.folder).markdown())
    text = "\n".join(documents)
    text.encode()
    return found, text


def damaged(found: tables.Tables) -> list[str]:
    """The cells that are named as damaged."""
    faults = found.faults[found.faults["status"] == "damaged"]["cell"]
    return [str(name) for name in faults if name != "sweep.toml"]  # these runs have none


def unseal(folder: Path) -> None:
    """Take a cell's checksums away, as who forges one would, so that what it holds is looked at."""
    written = json.loads((folder / RECORD).read_text())
    kept = {name: part for name, part in written.items() if name not in ("files", "sha256")}
    (folder / RECORD).write_text(json.dumps(kept))


def spoil(run: Run, seed: int, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """Add a cell, change what its cell.json says, and name its folder after the cell that it then
    describes."""
    cell = cell_of("reptile", seed=seed, episodes=20)
    add(run, cell)
    folder = run.cells / cell.id
    unseal(folder)
    written = json.loads((folder / RECORD).read_text())
    edit(written)
    (folder / RECORD).write_text(json.dumps(written))
    try:
        return folder.rename(run.cells / Cell(**written["settings"]).id)
    except (TypeError, ValueError):
        return folder


def put(part: str, name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda written: written[part].update({name: value})


EDITS = [
    put("settings", "algorithm", "x" * 1000),
    put("settings", "algorithm", "\x1b[2Jmaml"),
    put("settings", "dataset", "a\nb"),
    put("settings", "dataset", "\ud800"),
    put("settings", "ways", 10**30),
    put("settings", "ways", True),
    put("settings", "episodes", 10**15),
    put("settings", "seed", -1),
    put("settings", "meta_lr", float("nan")),
    put("settings", "hyperparameters", {"inner_lr": [1, 2]}),
    put("settings", "hyperparameters", {"inner_lr": float("inf")}),
    put("settings", "hyperparameters", {"label": 3}),
    put("settings", "hyperparameters", {"ways": "many"}),
    put("settings", "hyperparameters", 5),
    put("settings", "unknown", 5),
    put("figures", "mean", "much"),
    put("figures", "mean", float("nan")),
    put("figures", "mean", 1e300),
    put("figures", "mean", None),
    put("figures", "metric", ["accuracy"]),
    put("figures", "metric", "beauty"),
    put("figures", "episode_address", {"a": 1}),
    put("figures", "step_ms", "fast"),
    put("figures", "ways", 7),
    lambda written: written.update(figures=[1]),
    lambda written: written.update(source=["abc"]),
    lambda written: written.update(settings="none"),
    lambda written: written.pop("source"),
]


def test_cells_with_absurd_content_are_named_as_damaged(tmp_path: Path) -> None:
    run = three(tmp_path / "run")
    spoilt = set()
    for number, edit in enumerate(EDITS):
        spoilt.add(spoil(run, number + 1, edit).name)
    found, said = everything(run)
    assert found.leaderboard["algorithm"].tolist() == ["maml", "reptile", "anil"]
    assert len(spoilt) == len(EDITS)
    assert {name for name in spoilt if not any(name in one for one in damaged(found))} == set()
    assert {name for name in spoilt if name not in said} == set()
    assert "\x1b" not in said


def write(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def parquet(name: str, **columns: Any) -> Callable[[Path], Any]:
    return lambda folder: pd.DataFrame(columns).to_parquet(folder / name)


def more_rows(folder: Path) -> None:
    """A hundred million equal rows, which take a thousandth of the memory on disk."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pa.table({"episode": pa.repeat(1, 10**7)})
    with pq.ParquetWriter(folder / SCORES, rows.schema) as writer:
        for _ in range(10):
            writer.write_table(rows)
    assert (folder / SCORES).stat().st_size < 1_000_000


def endless(folder: Path) -> None:
    (folder / RECORD).unlink()
    (folder / RECORD).symlink_to("/dev/zero")


def pipe(folder: Path) -> None:
    (folder / RECORD).unlink()
    os.mkfifo(folder / RECORD)


BROKEN = [
    write(RECORD, b"[" * 100_000),
    write(RECORD, b'{"settings": 1' + b"0" * 10_000 + b"}"),
    write(RECORD, b"\xff\xfe"),
    write(RECORD, b" " * (65 << 20)),
    write(SCORES, b"PAR1 no table PAR1"),
    write(PERFORMANCE, b"PAR1"),
    parquet(SCORES, episode=["a"], step=[0], metric=[1.0]),
    parquet(SCORES, episode=[0, 0], step=[0, 0], metric=[1.0, 2.0]),
    parquet(SCORES, episode=[0], step=[0], metric=[float("nan")]),
    parquet(TRAINING, nothing=[1]),
    parquet(TRAINING, iteration=range(100), seconds=1.0, metric=1.0),
    parquet(PERFORMANCE, phase=["growth"], repeat=[1.0], seconds=["fast"]),
    parquet(PERFORMANCE, phase="meta_step", repeat=[0, 0], seconds=1.0, session="s"),
    parquet(PERFORMANCE, phase="meta_step", repeat=[0, 1], seconds=-1.0, session="s"),
    more_rows,
    endless,
    pipe,
]


def test_cells_with_broken_files_are_named_as_damaged(tmp_path: Path) -> None:
    run = three(tmp_path / "run")
    cells = [cell_of("reptile", seed=number + 1, episodes=20) for number in range(len(BROKEN))]
    for cell, spoilt in zip(cells, BROKEN, strict=True):
        add(run, cell)
        unseal(run.cells / cell.id)
        spoilt(run.cells / cell.id)
    found, said = everything(run)
    assert found.leaderboard["algorithm"].tolist() == ["maml", "reptile", "anil"]
    assert found.leaderboard["seeds"].tolist() == [1, 1, 1]
    for cell in cells:
        assert any(cell.id in name for name in damaged(found)) or cell.id in said


def test_failures_that_are_none_are_left_out(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for failures in (
        *([1, 2], "x", {"../../etc": {"settings": {}, "reason": "x"}}, {"a": None}),
        {OTHER.id: {"settings": OTHER.model_dump(), "reason": 5}},
        {"0" * 16: {"settings": OTHER.model_dump(), "reason": "of another cell"}},
    ):
        (run.folder / "failures.json").write_text(json.dumps(failures))
        assert run.failures() == {}
        assert run.summary().empty
    failures = {OTHER.id: {"settings": OTHER.model_dump(), "reason": "diverged"}}
    (run.folder / "failures.json").write_text(json.dumps(failures))
    assert run.failures() == failures


def test_a_reason_may_say_anything(tmp_path: Path) -> None:
    run = three(tmp_path / "run")
    run.fail(
        cell_of("boil", episodes=20), "\ud800 \x1b[2J </script><script>alert(1)</script> $\\x$"
    )
    _, said = everything(run)
    assert "<script>alert" not in said
    report.write(run.folder)


def test_folders_that_are_no_cells_are_named_in_one_line(tmp_path: Path) -> None:
    run = three(tmp_path / "run")
    (run.cells / "a\x1b[2J\nb").mkdir()
    Path(os.fsdecode(os.fsencode(run.cells) + b"/\xff")).mkdir()
    (run.cells / "file").write_text("x")
    (run.cells / "loop").symlink_to("loop")
    found, said = everything(run)
    assert len(found.leaderboard) == 3
    assert "\x1b" not in said
    assert len(damaged(found)) == 4


def test_links_in_a_results_folder_lead_no_writer_outside(tmp_path: Path) -> None:
    run = three(tmp_path / "run")
    outside = tmp_path / "outside"
    outside.mkdir()
    precious = outside / "precious"
    precious.write_text("precious")
    for name in ("report.html", "report.md.part", "comparison.csv", "comparison.csv.part"):
        (run.folder / name).symlink_to(precious)
    report.write(run.folder)
    assert precious.read_text() == "precious"
    assert not (run.folder / "report.html").is_symlink()
    for figure in run.figures.iterdir():
        figure.unlink()
    run.figures.rmdir()
    run.figures.symlink_to(outside)
    with pytest.raises(BenchError, match="figures is a link to elsewhere"):
        report.write(run.folder)
    assert list(outside.iterdir()) == [precious]


def test_names_are_text_in_every_document(tmp_path: Path) -> None:
    run = nasty(tmp_path / "run")
    found = tables.read(run)
    compared = comparison.compare([run.folder])
    html = report.page(run.folder, found, compared)
    markdown = paper.markdown(NASTY[0], found, compared.rows, compared.notes, "x ``` y")
    latex = paper.latex(found, compared.rows)
    plots.draw_all(run.summary().head(4), run.figures)
    assert (run.figures / "accuracy.svg").read_text().count("frac") >= 1
    assert "<script>alert" not in html
    assert "<img" not in html
    assert "<!--" not in html
    assert len(re.findall(r"<script[ >]", html)) == 3  # the data, Plotly and our own
    assert "<" not in markdown.replace("<br>", "")
    assert not re.search(r"(?<!\\)@everyone", markdown)
    assert "\n````\nx ``` y\n````\n" in markdown
    assert "\\input" not in latex
    assert not re.search(r"\\\\\s*\[", latex)
    table = check(run.folder, run.folder)
    table.table()
    assert "<script>" not in table.markdown()


# Anything at all

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-10, 10**20),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["accuracy", "mse", "maml", *NASTY]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)
slow = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)
KEYS = [*OTHER.model_dump(), "mean", "metric", "engine", "label", "episode_address", "source"]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return three(tmp_path_factory.mktemp("hostile") / "run")


@settings(slow, max_examples=settings.default.max_examples // 3)  # each takes half a second
@given(
    st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), values, max_size=3),
    st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), values, max_size=3),
    st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), scalars, max_size=2),
    values,
)
def test_no_results_folder_stops_what_reads_it(
    template: Run,
    tmp_path_factory: pytest.TempPathFactory,
    cell: dict[str, Any],
    figures: dict[str, Any],
    own: dict[str, Any],
    failures: Any,
) -> None:
    run = Run(tmp_path_factory.mktemp("hostile") / "run")
    shutil.copytree(template.folder, run.folder)

    def edit(written: dict[str, Any]) -> None:
        written["settings"].update(cell)
        written["figures"].update(figures)
        if isinstance(written["settings"]["hyperparameters"], dict):
            written["settings"]["hyperparameters"].update(own)

    spoil(run, 1, edit)
    (run.folder / "failures.json").write_text(json.dumps(failures))
    found, _ = everything(run)
    assert {"maml", "anil"} <= set(found.leaderboard["algorithm"])


# Settings files

REFUSED = {
    "unknown": (b"shot = [1]", "did you mean 'shots'?"),
    "mistyped": (b"shots = 'one'", "shots: 'one' is not an integer"),
    "truth": (b"shots = true", "shots: input should be a number"),
    "date": (b"seeds = 1979-05-27", "seeds"),
    "table": (b"algos = {maml = 1}", "algos"),
    "nested": (b"[set]\ninner_lr = [[1, 2]]", "number, a truth value or a word"),
    "no table": (b"set = 5", "'set' must be a table"),
    "infinite": (b"meta_lr = 1e999", "meta-lr: input should be a finite number"),
    "nan": (b"[set]\ninner_lr = nan", "inner-lr: input should be a finite number"),
    "huge": (b"iterations = 1" + b"0" * 30, "at most 63 bits"),
    "digits": (b"iterations = 1" + b"0" * 9000, "is not a TOML file"),
    "hexadecimal": (b"seeds = 0x1" + b"0" * 100_000, "a number of thousands of digits"),
    "memory": (b"meta_batch = 1000000000", "less than or equal to 10000"),
    "steps": (b"inner_steps = 1000000000", "is more than any takes"),
    "depth": (b"a = " + b"[" * 100_000, "is not a TOML file"),
    "cells": (
        b"seeds = [" + b"1," * 1000 + b"]\nways = [" + b"5," * 1000 + b"]",
        "4,000,000 cells",
    ),
    "size": (b"# " + b"x" * (10 << 20), "has more than 1 MiB"),
    "letters": (b"algos = ['" + b"x" * 10_000 + b"']", "at most 200 characters"),
    "control": (b'algos = ["maml\\u001b[2J"]', "printable characters"),
    "null": (b'data_root = "a\\u0000b"', "null character"),
    "binary": (b"\xff\xfe\x00", "is not a TOML file"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=list(REFUSED))
def test_settings_that_cannot_be_end_in_one_line(
    bench, tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "s.toml").write_bytes(content)
    status, out, err = bench("run", "--algos", "maml", "--config", "s.toml")
    if b"algos" in content:
        status, out, err = bench("run", "--config", "s.toml")
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert len(err) < 1100
    assert "\x1b" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["s.toml"]


def test_a_settings_file_without_end_is_read_no_further_than_it_may_go() -> None:
    with pytest.raises(BenchError, match="has more than 1 MiB"):
        read_sweep(Path("/dev/zero"), {})


def test_a_settings_file_alone_runs_no_code(bench, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    (tmp_path / "evil.py").write_text(f"open({str(proof)!r}, 'w')\n")
    (tmp_path / "s.toml").write_text("plugin = 'evil.py'\n")
    for command in (("run",), ("search", "--algos", "maml", "--space", "inner_lr=0.1:1")):
        status, _, err = bench(*command, "--config", "s.toml")
        assert status == 2
        assert "--config names the plug-in evil.py, whose code would be run" in err
    assert not proof.exists()
    bench("run", *QUICK, "--config", "s.toml", "--plugin", "evil.py", "--algos", "none")
    assert proof.exists()


names = st.sampled_from(
    [*Cell.model_fields, "algos", "datasets", "seeds", "devices", "set", "inner_lr", "inner_steps"]
)


@slow
@given(st.dictionaries(names | st.text(max_size=8), values, max_size=4))
def test_settings_are_taken_or_refused(
    tmp_path_factory: pytest.TempPathFactory, asked: dict[str, Any]
) -> None:
    import tomli_w

    path = tmp_path_factory.mktemp("settings") / "s.toml"
    try:
        path.write_text(tomli_w.dumps(asked))
    except (TypeError, ValueError, AttributeError, UnicodeEncodeError):
        return  # what TOML has not
    try:
        sweep = read_sweep(path, {})
    except BenchError:
        return
    assert sweep == read_sweep(path, {})
