"""What the README shows runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd

from tests.bench.conftest import QUICK

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_algorithm_in_ten_lines_is_ten_lines_and_equals_the_built_in_one(
    tmp_path: Path,
) -> None:
    (block,) = (b for b in BLOCKS if "algorithms.register" in b)
    body = block[block.index("@") :]
    assert len(body.strip().splitlines()) <= 10
    both = tmp_path / "my_fomaml.py"
    tiny = Path(QUICK[1]).read_text()
    both.write_text(block + "\n\n" + tiny)
    quick = ("--plugin", str(both), *QUICK[2:], "--costs", "never")
    arguments = ["run", "--algos", "my_fomaml,fomaml", *quick, "--out", str(tmp_path / "r")]
    done = subprocess.run([sys.executable, "-m", "bench", *arguments], cwd=README.parent)
    assert done.returncode == 0
    summary = pd.read_csv(tmp_path / "r" / "summary.csv")
    assert summary["mean"].nunique() == 1


def test_the_network_of_ones_own_is_trained(tmp_path: Path) -> None:
    (block,) = (b for b in BLOCKS if "models.register" in b)
    plugin = tmp_path / "my_net.py"
    plugin.write_text(block + "\n\n" + Path(QUICK[1]).read_text())
    quick = ("--plugin", str(plugin), *QUICK[2:], "--model", "two_layers", "--costs", "never")
    arguments = ["run", "--algos", "maml,anil", *quick, "--out", str(tmp_path / "r")]
    done = subprocess.run([sys.executable, "-m", "bench", *arguments], cwd=README.parent)
    assert done.returncode == 0
    summary = pd.read_csv(tmp_path / "r" / "summary.csv")
    assert set(summary["engine"]) == {"batched"}


def test_maml_on_a_list_of_tasks_learns_to_adapt() -> None:
    (block,) = (b for b in BLOCKS if "collate" in b)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    accuracy = names["scores"].metric.mean(0)
    assert accuracy[-1] > 0.9
    assert accuracy[-1] > accuracy[0] + 0.2


def test_every_file_the_readme_links_to_is_there() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
