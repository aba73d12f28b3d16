"""Whatever is typed, a command ends well or in one line."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bench.cli import main
from bench.sweep import COMMON, Settings
from tests.bench.conftest import QUICK

OPTIONS = [
    *("algos", "datasets", "ways", "shots", "seeds", "devices", "set", "config", "data-root"),
    *("out", "plugin", "space", "trials", "margin", "slowdown", "baseline", "scale", "keep"),
    *(name.replace("_", "-") for name in (*Settings.model_fields, *COMMON)),
]
typed = st.one_of(
    # As a shell passes it: no null character, and bytes that are no text as surrogates.
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(["maml", "tiny", "1,2", "0", "-1", "1e999", "nan", "none", "true", "\udcff"]),
    st.sampled_from(["inner_lr=0.1,0.2", "=", "a=", "ways=5", "/dev/null", "../..", "x" * 5000]),
    st.integers(-3, 3).map(str),
    st.integers(10**6, 10**40).map(str),
)
option = st.tuples(st.sampled_from(OPTIONS).map("--{}".format), typed)
commands = st.sampled_from(["run", "search", "compare", "check", "report", "reproduce", "list"])


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)
@example("list", [], [])
@given(commands | typed, st.lists(option, max_size=3), st.lists(typed, max_size=1))
def test_any_command_ends_well_or_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    options: list[tuple[str, str]],
    words: list[str],
) -> None:
    # All but the training itself: that of a second would be fine, but not that of an hour.
    monkeypatch.setattr("bench.runner.estimate_seconds", lambda cells, *_: {c.id: 0 for c in cells})
    monkeypatch.setattr("bench.search.run", lambda *_: [])
    monkeypatch.setattr("bench.reproduction.read", _no_recipe)
    monkeypatch.setenv("BENCH_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    arguments = [command, *words, *(word for pair in options for word in pair)]
    if command == "run":
        given_names = {name for name, _ in options}
        quick = zip(QUICK[::2], QUICK[1::2], strict=True)
        arguments += [word for pair in quick if pair[0] not in given_names for word in pair]
        arguments += ["--dry-run", *([] if "--algos" in given_names else ["--algos", "maml"])]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    assert status in (0, 1, 2)
    assert "Traceback" not in out.getvalue() + err.getvalue()
    if status == 2 and "Usage" in out.getvalue():  # a command without what it needs
        assert err.getvalue() == ""
    elif status == 2:
        assert err.getvalue().count("\n") == 1
        assert err.getvalue().startswith("bench: ")
        assert len(err.getvalue()) < 1100


def _no_recipe(name: str) -> None:
    from bench.errors import BenchError

    raise BenchError(f"no recipe is called {name!r}")
