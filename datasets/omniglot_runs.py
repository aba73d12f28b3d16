"""Omniglot's one-shot challenge: 20 runs of 20-way classification that its authors fixed.

Lake, Salakhutdinov, Tenenbaum, Science 2015. A run has one drawing of each of 20 characters, by one
person, and 20 drawings by another to be classified, all of one evaluation alphabet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from datasets.episodes import Batch, DatasetError, EpisodeSpec, Source, digest_of, floats

RUNS = 20
WAYS = 20


@dataclass(frozen=True, eq=False)
class Runs(Source):
    """The runs as episodes: episode i is run i + 1, whatever the seed.

    Args:
        support: uint8 ``(runs, ways, *sample_shape)``, class by class.
        query: the drawings to be classified, of the same shape.
        labels: int64 ``(runs, ways)``, the class of each of them.
    """

    support: Tensor
    query: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_shape", tuple(self.support.shape[2:]))

    @cached_property
    def digest(self) -> str:
        return digest_of(self.support, self.query, self.labels)

    def check(self, spec: EpisodeSpec) -> None:
        if (spec.ways, spec.shots, spec.test_shots) != (self.support.shape[1], 1, 1):
            raise DatasetError(
                f"the runs of {spec.dataset} are {self.support.shape[1]}-way 1-shot with 1 test "
                f"shot, not {spec.ways}-way {spec.shots}-shot with {spec.test_shots}"
            )

    def episodes(self, spec: EpisodeSpec) -> int:
        return len(self.support)

    def batch(self, spec: EpisodeSpec, indices: Sequence[int]) -> Batch:
        self.check(spec)
        chosen = list(indices)
        classes = torch.arange(self.support.shape[1], device=self.labels.device)

        def inputs(images: Tensor) -> Tensor:
            return floats(images[chosen])

        return {
            "train": (inputs(self.support), classes.repeat(len(chosen), 1)),
            "test": (inputs(self.query), self.labels[chosen]),
        }

    def to(self, device: torch.device | str) -> Runs:
        return Runs(*(part.to(device) for part in (self.support, self.query, self.labels)))


def members() -> list[str]:
    """The archive's files, run by run: support drawings, query drawings, and the answers."""
    numbers = range(1, WAYS + 1)
    return [
        f"run{run:02}/{name}"
        for run in range(1, RUNS + 1)
        for name in (
            *(f"training/class{number:02}.png" for number in numbers),
            *(f"test/item{number:02}.png" for number in numbers),
            "class_labels.txt",
        )
    ]


def answers(text: bytes, where: str) -> list[int]:
    """The class, from 0, of each query drawing of a run, as its ``class_labels.txt`` says.

    Raises:
        DatasetError: not a line for each drawing with the drawing of its class beside it.
    """
    run = where.rpartition(": ")[2].partition("/")[0]
    said = dict(
        line.split()
        for line in text.decode("ascii", "replace").splitlines()
        if len(line.split()) == 2
    )
    classes = {f"{run}/training/class{number:02}.png": number - 1 for number in range(1, WAYS + 1)}
    items = [f"{run}/test/item{number:02}.png" for number in range(1, WAYS + 1)]
    if sorted(said) != items or not set(said.values()) <= set(classes):
        raise DatasetError(f"{where} does not pair {WAYS} items with drawings of the run")
    return [classes[said[item]] for item in items]
