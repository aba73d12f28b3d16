"""Write into docs/performance.md how many kernels a GPU is made to launch by a step.

    python -m docs.launches

Counted on the emulated accelerator of the tests, as operators that compute something.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

import algorithms
from algorithms import models
from bench.files import filled, write_text
from tests.accelerator import DEVICE, accelerator
from tests.performance.peers.work import SETTINGS, Setting, episodes

PAGE = Path(__file__).with_name("performance.md")
WAYS_TO_RUN = {
    "`higher`": {"engine": "higher"},
    "`batched`": {"engine": "batched"},
    "`batched`, `cuda_graphs`": {"engine": "batched", "cuda_graphs": True},
}


def launches(setting: Setting, **settings: object) -> int:
    """Of one step, once the first has looked at the model."""
    if "cuda_graphs" in settings:  # one launch, whatever it is made of
        setting = replace(setting, tasks=2)
    x_support, y_support, x_query, y_query = map(torch.from_numpy, episodes(setting))
    batch = {"train": (x_support, y_support), "test": (x_query, y_query)}
    outputs = 1 if setting.regression else setting.ways
    evaluated = setting.kind == "evaluation"
    with accelerator() as log:
        model = models.build(setting.model, setting.shape, outputs, seed=0).to(DEVICE)
        algorithm = algorithms.create(
            "maml" if evaluated else setting.kind, model, inner_steps=setting.steps, **settings
        )
        for _ in range(2):
            log.launched.clear()
            if evaluated:
                algorithm.evaluate(batch)
            else:
                algorithm.meta_backward(batch)
        return len(log.launched)


def main() -> None:
    """Count, and write the page."""
    head = ["setting", *WAYS_TO_RUN]
    lines = [head, ["---"] * len(head)]
    for setting in SETTINGS.values():
        counts = [launches(setting, **settings) for settings in WAYS_TO_RUN.values()]
        lines.append([setting.title, *(f"{count:,}" for count in counts)])
        print(*lines[-1])
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    write_text(PAGE, filled(PAGE.read_text(encoding="utf-8"), "launches", table))


if __name__ == "__main__":
    main()
