"""torchmeta's helper functions and its loader, over the episodes of this project.

A training script written for torchmeta runs with its imports changed::

    from datasets.helpers import BatchMetaDataLoader, omniglot

    dataset = omniglot("data", shots=5, ways=5, test_shots=15, meta_train=True, download=True)
    for batch in BatchMetaDataLoader(dataset, batch_size=16, num_workers=4):
        inputs, targets = batch["train"]

There are ``omniglot``, ``miniimagenet``, ``cifar_fs``, ``fc100``, ``sinusoid`` and, of this
project, ``glyphs``. What differs: all randomness hangs on ``seed``, where torchmeta's governs a
part of it; samples are ready (resized, floats in [0, 1]), so a ``transform`` has nothing to work
on. An argument that cannot be honoured is refused, not ignored. (torchmeta: Deleu et al. 2019,
arXiv 1909.06576.)
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets import EpisodeLoader, loader
from datasets.episodes import DatasetError

TorchmetaBatch = OrderedDict[str, list[Tensor]]
"""``train`` and ``test`` (or other names, by :func:`ClassSplitter`), each ``[inputs, targets]``."""


@dataclass(frozen=True)
class Rotation:
    """torchmeta's class augmentation: every angle, in degrees, is a new class."""

    angles: Any

    def __post_init__(self) -> None:
        if isinstance(self.angles, int | float):
            object.__setattr__(self, "angles", (self.angles,))


@dataclass(frozen=True)
class Categorical:
    """torchmeta's target transform: labels 0 to ``num_classes - 1``, permuted in each task."""

    num_classes: int


@dataclass(frozen=True, eq=False)
class MetaDataset:
    """What the helpers return, for :class:`BatchMetaDataLoader`."""

    episodes: EpisodeLoader = field(repr=False)
    names: tuple[str, str] = ("train", "test")
    """What batches call the support set and the query set."""


class BatchMetaDataLoader:
    """An endless stream of batches; a second loop over it goes on where the first one ended.

    Batches are made in this process from data held in memory, so ``num_workers``, ``timeout`` and
    ``drop_last`` change nothing.

    Args:
        dataset: from one of the helpers.
        batch_size: tasks a batch, B.
        pin_memory: put batches in pinned memory, where there is a GPU to copy them to.

    Raises:
        DatasetError: ``shuffle=False``, or a sampler or a worker's function.
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
        _only(True, shuffle=shuffle)
        _only(None, sampler=sampler, worker_init_fn=worker_init_fn)
        self.dataset = dataset
        self.batch_size = batch_size
        self.pin_memory = pin_memory and torch.cuda.is_available()
        self._batches = iter(replace(dataset.episodes, batch_size=batch_size))

    def __iter__(self) -> Iterator[TorchmetaBatch]:
        for batch in self._batches:
            halves = zip(self.dataset.names, (batch["train"], batch["test"]), strict=True)
            yield OrderedDict(
                (name, [self._placed(part) for part in half]) for name, half in halves
            )

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.pin_memory else tensor


def ClassSplitter(  # noqa: N802 - torchmeta's name
    task: MetaDataset,
    shuffle: bool = True,
    num_samples_per_class: Mapping[str, int] | None = None,
    num_train_per_class: int | None = None,
    num_test_per_class: int | None = None,
    num_support_per_class: int | None = None,
    num_query_per_class: int | None = None,
    random_state_seed: int = 0,
) -> MetaDataset:
    """The same dataset with other shots; the spelling chosen also names the halves of a batch.

    Raises:
        DatasetError: not exactly two halves, more samples than a class has, or an argument that
            cannot be honoured.
    """
    _only(True, shuffle=shuffle)
    _only(0, random_state_seed=random_state_seed)
    samples = num_samples_per_class or {
        **_first(train=num_train_per_class, support=num_support_per_class),
        **_first(test=num_test_per_class, query=num_query_per_class),
    }
    if len(samples) != 2:
        raise DatasetError(
            "ClassSplitter needs two sets of samples, such as num_support_per_class=1, "
            "num_query_per_class=15"
        )
    (support, shots), (query, test_shots) = samples.items()
    spec = replace(task.episodes.spec, shots=shots, test_shots=test_shots)
    return MetaDataset(replace(task.episodes, spec=spec), (support, query))


def classification(
    dataset: str,
    folder: Path | str,
    shots: int,
    ways: int,
    shuffle: bool = True,
    test_shots: int | None = None,
    seed: int | None = None,
    *,
    meta_train: bool = False,
    meta_val: bool = False,
    meta_test: bool = False,
    meta_split: str | None = None,
    download: bool = False,
    transform: None = None,
    target_transform: Categorical | None = None,
    dataset_transform: None = None,
    class_augmentations: None = None,
) -> MetaDataset:
    """Any registered dataset with the arguments of torchmeta's helpers.

    Args:
        dataset: a name from :func:`datasets.names`.
        folder: the folder that contains the dataset's own.
        shots: support samples a class.
        ways: classes a task.
        shuffle: only True is supported, and of the transforms and augmentations only the defaults.
        test_shots: query samples a class; as many as ``shots`` if None.
        seed: which stream of episodes; if None, one drawn from the ``random`` module.
        meta_train, meta_val, meta_test, meta_split: which split; exactly one is to be given.
        download: fetch what is missing, where the dataset knows an address.

    Raises:
        DatasetError: data that is absent or broken, a split too small for such tasks, or an
            argument that cannot be honoured.
    """
    _only(True, shuffle=shuffle)
    _only(None, transform=transform, dataset_transform=dataset_transform)
    _only(None, class_augmentations=class_augmentations)
    if target_transform is not None:
        _only(Categorical(ways), target_transform=target_transform)
    flags = {"train": meta_train, "val": meta_val, "test": meta_test}
    splits = {split for split, chosen in flags.items() if chosen} | {meta_split} - {None}
    if len(splits) != 1:
        raise DatasetError("give exactly one of meta_train, meta_val, meta_test and meta_split")
    episodes = loader(
        dataset,
        ways=ways,
        shots=shots,
        test_shots=shots if test_shots is None else test_shots,
        split=str(splits.pop()),
        seed=_seed(seed),
        root=Path(folder).expanduser(),
        download=download,
    )
    return MetaDataset(episodes)


miniimagenet = partial(classification, "mini_imagenet")
cifar_fs = partial(classification, "cifar_fs")
fc100 = partial(classification, "fc100")
glyphs = partial(classification, "glyphs")


def omniglot(
    *args: Any,
    use_vinyals_split: bool = True,
    class_augmentations: Sequence[Rotation] = (Rotation((90, 180, 270)),),
    **kwargs: Any,
) -> MetaDataset:
    """Omniglot, with its rotations as classes; other arguments as for :func:`classification`.

    Args:
        use_vinyals_split: if False, background against evaluation alphabets (no ``meta_val``).
        class_augmentations: only the default is supported.
    """
    angles = [angle for rotation in class_augmentations or () for angle in rotation.angles]
    _only([90, 180, 270], class_augmentations=angles)
    dataset = "omniglot" if use_vinyals_split else "omniglot_lake"
    return classification(dataset, *args, **kwargs)


def sinusoid(
    shots: int,
    shuffle: bool = True,
    test_shots: int | None = None,
    seed: int | None = None,
    *,
    num_tasks: int = 1_000_000,
    noise_std: None = None,
    transform: None = None,
    target_transform: None = None,
    dataset_transform: None = None,
) -> MetaDataset:
    """Sine waves to regress; as in ``torchmeta.toy.helpers``, with no folder, ways or split.

    Other arguments as for :func:`classification`.
    """
    _only(True, shuffle=shuffle)
    _only(1_000_000, num_tasks=num_tasks)
    _only(None, noise_std=noise_std, transform=transform, target_transform=target_transform)
    _only(None, dataset_transform=dataset_transform)
    query = shots if test_shots is None else test_shots
    return MetaDataset(loader("sinusoid", shots=shots, test_shots=query, seed=_seed(seed)))


def _seed(seed: int | None) -> int:
    # From Python's own generator, as torchmeta's sampler: random.seed() makes it repeatable.
    return random.getrandbits(63) if seed is None else seed


def _first(**given: int | None) -> dict[str, int]:
    """The first that is given, by itself."""
    return dict([(name, value) for name, value in given.items() if value is not None][:1])


def _only(supported: object, **arguments: object) -> None:
    for name, value in arguments.items():
        if value != supported:
            raise DatasetError(f"{name}={value!r} is not supported, only {supported!r}")
