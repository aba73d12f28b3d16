"""torchmeta's loader, and what its scripts put around a dataset, over this project's episodes.

(torchmeta: Deleu et al. 2019, arXiv 1909.06576.) Scripts import all of it from
:mod:`datasets.helpers`.
"""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from datasets.episodes import DatasetError, EpisodeLoader, EpisodeSpec, Source

TorchmetaBatch = OrderedDict[str, list[Tensor]]
"""``train`` and ``test`` (or other names, by :func:`ClassSplitter`), each ``[inputs, targets]``."""

WAVES = 1_000_000
"""Tasks of a dataset that has no classes to choose from, as torchmeta's default."""


@dataclass(eq=False)
class MetaDataset:
    """Tasks, for :class:`BatchMetaDataLoader`.

    Attributes:
        source: the data.
        name, split: what they are called in an episode's address.
        num_classes_per_task: ways; 1 for regression.
        stream: seed of the stream of episodes.
        samples: what batches call the support set and the query set, and how many samples of each
            class they have; None as long as :func:`ClassSplitter` has not said it.

    Raises:
        DatasetError: tasks that the source cannot fill.
    """

    source: Source = field(repr=False)
    name: str
    split: str
    num_classes_per_task: int
    stream: int
    samples: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if self.samples is not None:
            assert self.episodes is not None  # which checks that there are such

    @property
    def episodes(self) -> EpisodeLoader:
        """The tasks, one at a time.

        Raises:
            DatasetError: they are not split yet.
        """
        if self.samples is None:
            raise DatasetError(
                f"tasks of {self.name} are not split into a support and a query set; wrap the "
                "dataset in ClassSplitter, or give it as dataset_transform"
            )
        ways, (shots, test_shots) = self.num_classes_per_task, self.samples.values()
        spec = EpisodeSpec(self.name, self.split, ways, shots, test_shots, self.stream)
        return EpisodeLoader(self.source, spec)

    def seed(self, seed: int) -> None:
        """Choose the stream of episodes."""
        self.stream = seed

    def __len__(self) -> int:
        """How many tasks there are, those of the same classes counted as one; at most what
        ``len`` can give."""
        classes = self.source.class_count()
        tasks = WAVES if classes is None else math.comb(classes, self.num_classes_per_task)
        return min(tasks, sys.maxsize)


class BatchMetaDataLoader:
    """Batches of tasks; a loop over it ends after as many tasks as the dataset has, which of most
    datasets is never, and the next one goes on from there.

    Batches are made in this process from data held in memory, so ``num_workers`` and ``timeout``
    change nothing.

    Args:
        dataset: from :mod:`datasets.helpers`.
        batch_size: tasks a batch, B.
        pin_memory: put batches in pinned memory, where there is a GPU to copy them to.
        drop_last: end before a batch that the tasks do not fill; else it is filled with more.

    Raises:
        DatasetError: ``shuffle=False``, a sampler or a worker's function, or tasks that are not
            split.
    """

    def __init__(
        self,
        dataset: MetaDataset,
        batch_size: int = 1,
        shuffle: bool = True,
        sampler: None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: None = None,
    ) -> None:
        only(True, shuffle=shuffle)
        only(None, sampler=sampler, worker_init_fn=worker_init_fn)
        self.dataset = dataset
        self.batch_size = batch_size
        self.pin_memory = pin_memory and torch.cuda.is_available()
        self.drop_last = drop_last
        self._next = 0
        self._batches()

    def _batches(self) -> EpisodeLoader:
        return replace(self.dataset.episodes, batch_size=self.batch_size)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.dataset), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[TorchmetaBatch]:
        batches = self._batches()
        for _ in range(len(self)):
            batch = batches[self._next]
            self._next += 1  # once it is made: an interruption loses none
            assert self.dataset.samples is not None
            halves = zip(self.dataset.samples, (batch["train"], batch["test"]), strict=True)
            yield OrderedDict(
                (name, [self._placed(part) for part in half]) for name, half in halves
            )

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.pin_memory else tensor


def ClassSplitter(  # noqa: N802 - torchmeta's name
    task: MetaDataset | None = None,
    shuffle: bool = True,
    num_samples_per_class: Mapping[str, int] | None = None,
    num_train_per_class: int | None = None,
    num_test_per_class: int | None = None,
    num_support_per_class: int | None = None,
    num_query_per_class: int | None = None,
    random_state_seed: int = 0,
) -> Any:
    """The same dataset with these shots; the spelling chosen also names the halves of a batch.

    Returns:
        The :class:`MetaDataset`; without a ``task`` a function that makes one of it, for a
        dataset's ``dataset_transform``.

    Raises:
        DatasetError: not exactly two halves, more samples than a class has, or an argument that
            cannot be honoured.
    """
    only(True, shuffle=shuffle)
    only(0, random_state_seed=random_state_seed)
    samples = num_samples_per_class or {
        **_first(train=num_train_per_class, support=num_support_per_class),
        **_first(test=num_test_per_class, query=num_query_per_class),
    }
    if len(samples) != 2:
        raise DatasetError(
            "ClassSplitter needs two sets of samples, such as num_support_per_class=1, "
            "num_query_per_class=15"
        )
    split = Splitter(dict(samples))
    return split if task is None else split(task)


@dataclass(frozen=True)
class Splitter:
    """What :func:`ClassSplitter` does to a dataset."""

    samples: Mapping[str, int]

    def __call__(self, task: MetaDataset) -> MetaDataset:
        """The dataset, its tasks split."""
        return replace(task, samples=self.samples)


@dataclass(frozen=True)
class Categorical:
    """torchmeta's target transform: labels 0 to ``num_classes - 1``, permuted in each task; None
    means as many as a task has."""

    num_classes: int | None = None


@dataclass(frozen=True)
class Rotation:
    """torchmeta's class augmentation: every angle, in degrees, is a new class."""

    angle: Any
    resample: bool = False
    expand: bool = False
    center: None = None

    def __post_init__(self) -> None:
        only(False, resample=self.resample, expand=self.expand)
        only(None, center=self.center)

    @property
    def angles(self) -> tuple[float, ...]:
        """Each in [0, 360)."""
        several = (self.angle,) if isinstance(self.angle, int | float) else self.angle
        return tuple(angle % 360 for angle in several)


def as_samples_are(transform: Any, sides: tuple[int, ...]) -> bool:
    """Whether a transform of torchvision's, or a chain of them, asks for what samples are anyhow:
    float tensors of such images (Resize and ToTensor).

    Args:
        transform: an instance, or None.
        sides: height and width; empty where samples are no images.
    """
    steps = getattr(transform, "transforms", [transform] if transform is not None else [])
    for step in steps:
        kind, size = type(step).__name__, getattr(step, "size", None)
        resized = kind == "Resize" and len(sides) == 2 and size in (sides[0], sides, list(sides))
        if not (resized or kind in ("ToTensor", "ToTensor1D")):
            return False
    return True


def only(supported: object, **arguments: object) -> None:
    """Refuse arguments of other values.

    Raises:
        DatasetError: one that is not what is supported; it is named.
    """
    for name, value in arguments.items():
        if value != supported:
            raise DatasetError(f"{name}={value!r} is not supported, only {supported!r}")


def _first(**given: int | None) -> dict[str, int]:
    """The first that is given, by itself."""
    return dict([(name, value) for name, value in given.items() if value is not None][:1])


Transform = Callable[[MetaDataset], MetaDataset]
