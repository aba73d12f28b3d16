"""Omniglot's one-shot challenge from the command line."""

from pathlib import Path

import pandas as pd
import pytest

from tests.datasets.conftest import omniglot_root as _omniglot_root
from tests.datasets.test_omniglot_runs import write_runs

omniglot_root = _omniglot_root
ASKED = (
    *("run", "--algos", "maml", "--protocol", "lake", "--ways", "20", "--test-shots", "1"),
    *("--episodes", "20", "--norm", "support", "--model", "fc", "--iterations", "2"),
    *("--devices", "cpu", "--data-root", ".", "--out", "r", "--meta-batch", "1"),
)


def test_the_runs_are_the_test_and_errors_stand_beside_the_published(
    bench, omniglot_root: Path
) -> None:
    write_runs(omniglot_root)
    status, out, err = bench(*ASKED, "--datasets", "omniglot_lake")
    assert (status, err) == (0, "")
    summary = pd.read_csv("r/summary.csv")
    assert (summary["protocol"][0], summary["episodes"][0]) == ("lake", 20)
    assert f"note:  errors over 20 runs: maml {100 * (1 - summary['mean'][0]):.1f} ±" in out
    assert "people 4.5%, BPL 3.3%, siamese network 8.0%" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--datasets", "glyphs"), "--protocol lake is for --datasets omniglot_lake alone"),
        (("--datasets", "omniglot_lake"), "all_runs.zip is missing"),
    ],
)
def test_what_has_no_runs_is_one_line(
    bench, omniglot_root: Path, arguments: tuple[str, ...], message: str
) -> None:
    status, _, err = bench(*ASKED, *arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert not Path("r").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ways", "5"), "are 20-way 1-shot with 1 test shot, not 5-way 1-shot with 1"),
        (("--episodes", "30"), "not 30; give --episodes 20"),
    ],
)
def test_other_episodes_than_the_runs_are_refused(
    bench, omniglot_root: Path, arguments: tuple[str, ...], message: str
) -> None:
    write_runs(omniglot_root)
    status, _, err = bench(*ASKED, "--datasets", "omniglot_lake", *arguments)
    assert status == 2
    assert message in err
