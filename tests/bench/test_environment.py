from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from bench.environment import environment, maker, makers
from bench.reading import figures_of
from bench.sweep import Sweep


def test_it_names_what_a_result_may_depend_on() -> None:
    found = environment(Sweep(devices=["cpu"], seeds=[3, 4]))
    assert found["seeds"] == [3, 4]
    assert set(found["packages"]) >= {"torch", "higher", "numpy"}
    assert found["threads"] >= 1
    assert found["blas"] != "unknown"
    assert set(found["clocks"]) == {"wall", "process"}
    json.dumps(found)


def test_a_processor_of_any_name_can_stand_in_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.environment.cpu_name", lambda: "Intel(R) CPU     E5620  @ 2.40GHz\n")
    figures = maker("cpu") | {"mean": 0.5, "commit": None}
    assert figures_of(figures) == figures
    assert figures["processor"] == "Intel(R) CPU E5620 @ 2.40GHz"
    assert makers([figures, figures | {"torch": "1.0"}]) == {
        "commit": "unknown",
        "processor": "Intel(R) CPU E5620 @ 2.40GHz",
        "threads": "unknown",
        "torch": f"{torch.__version__}, 1.0",
    }
    assert makers([]) == {}


def test_it_says_how_torch_is_set() -> None:
    ask = (
        "import torch; torch.set_num_threads(1); torch.use_deterministic_algorithms(True);"
        "from bench.environment import environment; from bench.sweep import Sweep; import json;"
        "print(json.dumps(environment(Sweep(devices=['cpu']))))"
    )
    said = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    found = json.loads(said.stdout)
    assert found["threads"] == 1
    assert found["deterministic"]["flags"]["torch.use_deterministic_algorithms"] is True
    assert torch.are_deterministic_algorithms_enabled() is False
