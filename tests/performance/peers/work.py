"""What is timed: the settings, and the arrays that every subject is handed for one.

Nothing here needs torch, JAX or this project's packages, so that it serves in every process.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
        kind: ``"maml"`` and ``"fomaml"`` ask for the meta-gradient, ``"evaluation"`` for the query
            loss of each task after 0, 1, ... steps.
        model: a name of ``algorithms.models``.
        queries: a class, as shots; for regression points of a task.
        lr: step size of the inner loop, plain gradient descent on the mean loss.
    """

    kind: str = "maml"
    model: str = "conv4"
    shape: tuple[int, ...] = (1, 28, 28)
    ways: int = 5
    shots: int = 1
    queries: int = 1
    steps: int = 1
    tasks: int = 32
    lr: float = 0.1

    @property
    def regression(self) -> bool:
        return len(self.shape) == 1

    @property
    def title(self) -> str:
        """The setting in words."""
        network = {"conv4": "Omniglot net", "conv4_pool": "miniImageNet net", "mlp": "sinusoid MLP"}
        place = f"{self.shots}-shot" if self.regression else f"{self.ways}w{self.shots}s"
        count = f"{self.tasks} {'episodes' if self.kind == 'evaluation' else 'tasks'}"
        order = {"maml": "second order", "fomaml": "first order", "evaluation": "evaluation"}
        steps = f"{self.steps} step{'s' * (self.steps > 1)}"
        words = (network[self.model], place, f"q{self.queries}", steps, count, order[self.kind])
        return ", ".join(words)


SETTINGS = {
    "omniglot": Setting(),
    "omniglot-first-order": Setting(kind="fomaml"),
    "omniglot-5-steps": Setting(queries=15, steps=5),
    "20-way": Setting(ways=20, steps=5, tasks=16),
    "mini-imagenet": Setting(
        model="conv4_pool", shape=(3, 84, 84), queries=15, steps=5, tasks=4, lr=0.01
    ),
    "sinusoid": Setting(model="mlp", shape=(1,), ways=1, shots=10, queries=10, tasks=25, lr=0.01),
    "evaluation": Setting(kind="evaluation", queries=15, steps=10, tasks=60),
}

BASE = Setting(tasks=4)
GROWTH = {
    "tasks": (4, 8, 16, 32, 64),
    "steps": (1, 2, 4, 8),
    "shots": (1, 2, 4, 8, 16),
    "ways": (5, 10, 20, 40),
}
"""What grows from :data:`BASE`, one at a time, and how far."""


@dataclass(frozen=True)
class Work:
    """A setting with its arrays.

    Attributes:
        weights: the initial parameters by name, in the model's order.
        adapted: names of those that the inner loop changes; the others are learned outside alone.
        batch: ``(support inputs, support targets, query inputs, query targets)``, each with a
            leading dimension that counts tasks.
    """

    setting: Setting
    weights: Arrays
    adapted: list[str]
    batch: tuple[np.ndarray, ...]

    def of(self, dtype: Any, tasks: int | None = None) -> Work:
        """The same in another precision, and of the first so many tasks."""

        def cast(array: np.ndarray) -> np.ndarray:
            return array.astype(dtype) if array.dtype.kind == "f" else array

        return Work(
            replace(self.setting, tasks=tasks or self.setting.tasks),
            {name: cast(value) for name, value in self.weights.items()},
            self.adapted,
            tuple(cast(array[:tasks]) for array in self.batch),
        )


def episodes(setting: Setting) -> tuple[np.ndarray, ...]:
    """Random episodes with something to learn: a picture of each class with noise, or waves."""
    draw = np.random.default_rng(0)
    if setting.regression:
        size = (setting.tasks, setting.shots + setting.queries, 1)
        x = draw.uniform(-5, 5, size)
        amplitude, phase = (draw.uniform(*b, (len(x), 1, 1)) for b in ((0.1, 5), (0, np.pi)))
        y = amplitude * np.sin(x - phase)
        return (*(a[:, : setting.shots] for a in (x, y)), *(a[:, setting.shots :] for a in (x, y)))
    classes = draw.random((setting.tasks, setting.ways, *setting.shape))
    labels = np.stack([draw.permutation(setting.ways) for _ in range(setting.tasks)])

    def half(each: int) -> tuple[np.ndarray, np.ndarray]:
        pictures = np.repeat(classes, each, axis=1)
        noise = 0.3 * draw.standard_normal(pictures.shape)
        return pictures + noise, np.repeat(labels, each, axis=1)

    return (*half(setting.shots), *half(setting.queries))


def relative_error(found: Arrays, expected: Arrays) -> float:
    """|found - expected| / |expected| over all arrays; infinite where their names differ."""
    if found.keys() != expected.keys():
        return float("inf")
    pairs = [(np.asarray(found[name], float), np.asarray(expected[name], float)) for name in found]
    away = sum(float(((a - b) ** 2).sum()) for a, b in pairs)
    return (away / sum(float((b**2).sum()) for _, b in pairs)) ** 0.5
