"""torchmeta's helper functions and its datasets, over the episodes of this project.

A training script written for torchmeta's loader runs with its imports changed::

    from datasets.helpers import BatchMetaDataLoader, omniglot

    dataset = omniglot("data", shots=5, ways=5, test_shots=15, meta_train=True, download=True)
    for batch in BatchMetaDataLoader(dataset, batch_size=16, num_workers=4):
        inputs, targets = batch["train"]

There are the functions ``omniglot``, ``miniimagenet``, ``cifar_fs``, ``fc100``, ``sinusoid`` and,
of this project, ``glyphs``; the datasets ``Omniglot``, ``MiniImagenet``, ``CIFARFS``, ``FC100`` and
``Sinusoid``, which ``ClassSplitter`` splits; ``Categorical`` and ``Rotation``. What differs: all
randomness hangs on ``seed``, where torchmeta's governs a part of it; samples are ready (resized,
floats in [0, 1]), so a ``transform`` may ask for that and for nothing else. An argument that cannot
be honoured is refused, not ignored.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets.base import get
from datasets.episodes import ClassSource, DatasetError
from datasets.meta_dataset import (
    BatchMetaDataLoader,
    Categorical,
    ClassSplitter,
    MetaDataset,
    Rotation,
    Splitter,
    TorchmetaBatch,
    Transform,
    as_samples_are,
    only,
)
from datasets.omniglot import upright
from datasets.sinusoid import SinusoidSource

__all__ = [
    "CIFARFS",
    "FC100",
    "BatchMetaDataLoader",
    "Categorical",
    "ClassSplitter",
    "MetaDataset",
    "MiniImagenet",
    "Omniglot",
    "Rotation",
    "Sinusoid",
    "TorchmetaBatch",
    "cifar_fs",
    "fc100",
    "glyphs",
    "miniimagenet",
    "omniglot",
    "sinusoid",
]

ROTATIONS = (Rotation((90, 180, 270)),)


def unsplit(
    dataset: str,
    root: Path | str,
    num_classes_per_task: int | None = None,
    meta_train: bool = False,
    meta_val: bool = False,
    meta_test: bool = False,
    meta_split: str | None = None,
    transform: Any = None,
    target_transform: Categorical | None = None,
    dataset_transform: Transform | None = None,
    class_augmentations: Sequence[Rotation] | None = None,
    download: bool = False,
    *,
    seed: int | None = None,
) -> MetaDataset:
    """Any registered dataset of classes with the arguments of torchmeta's datasets.

    Args:
        dataset: a name from :func:`datasets.names`.
        root: the folder that contains the dataset's own.
        num_classes_per_task: ways.
        meta_train, meta_val, meta_test, meta_split: which split; exactly one is to be given.
        transform: torchvision's Resize to what samples have, ToTensor, or a chain of them.
        target_transform: ``Categorical``, of as many classes as a task has.
        dataset_transform: a ``ClassSplitter`` without a task.
        class_augmentations: ``Rotation`` by 90, 180 and 270 degrees, or None, for Omniglot alone.
        download: fetch what is missing, where the dataset knows an address.
        seed: which stream of episodes; if None, one drawn from the ``random`` module.

    Raises:
        DatasetError: data that is absent or broken, a split too small for such tasks, or an
            argument that cannot be honoured.
    """
    if num_classes_per_task is None:
        raise DatasetError("num_classes_per_task is None; it must say how many classes a task has")
    flags = {"train": meta_train, "val": meta_val, "test": meta_test}
    splits = {split for split, chosen in flags.items() if chosen} | {meta_split} - {None}
    if len(splits) != 1:
        raise DatasetError("give exactly one of meta_train, meta_val, meta_test and meta_split")
    split = str(splits.pop())
    if target_transform not in (None, Categorical(), Categorical(num_classes_per_task)):
        only(Categorical(num_classes_per_task), target_transform=target_transform)
    kind = get(dataset)(root=Path(root).expanduser(), download=download)
    if split not in kind.splits:
        raise DatasetError(f"{dataset} has no {split!r} split; it has {', '.join(kind.splits)}")
    source = kind.load(split)
    if dataset.startswith("omniglot"):
        angles = {angle for each in class_augmentations or () for angle in each.angles}
        if not angles:
            assert isinstance(source, ClassSource)
            dataset, source = f"{dataset}_upright", upright(source)
        elif angles != {90, 180, 270}:
            only(list(ROTATIONS), class_augmentations=class_augmentations)
    else:
        only(None, class_augmentations=class_augmentations)
    if not as_samples_are(transform, tuple(source.sample_shape[1:])):
        sides = "x".join(map(str, source.sample_shape[1:]))
        raise DatasetError(
            f"transform={transform!r} is not supported, only Resize to {sides} and ToTensor"
        )
    made = MetaDataset(source, dataset, split, num_classes_per_task, _seed(seed))
    return made if dataset_transform is None else _split(made, dataset_transform)


def classification(
    dataset: str,
    folder: Path | str,
    shots: int,
    ways: int,
    shuffle: bool = True,
    test_shots: int | None = None,
    seed: int | None = None,
    **options: Any,
) -> MetaDataset:
    """Any registered dataset with the arguments of torchmeta's helpers.

    Args:
        dataset: a name from :func:`datasets.names`.
        folder: the folder that contains the dataset's own.
        shots: support samples a class.
        ways: classes a task.
        shuffle: only True is supported.
        test_shots: query samples a class; as many as ``shots`` if None.
        seed: which stream of episodes; if None, one drawn from the ``random`` module.
        options: those of :func:`unsplit`, but for ``dataset_transform``.

    Raises:
        DatasetError: as :func:`unsplit`.
    """
    only(True, shuffle=shuffle)
    only(None, dataset_transform=options.pop("dataset_transform", None))
    made = unsplit(dataset, folder, ways, seed=seed, **options)
    return _halved(made, shots, test_shots)


def _omniglot(dataset: Any, *args: Any, use_vinyals_split: bool = True, **options: Any) -> Any:
    """Without ``use_vinyals_split`` background against evaluation alphabets, no ``meta_val``."""
    return dataset("omniglot" if use_vinyals_split else "omniglot_lake", *args, **options)


Omniglot = partial(_omniglot, unsplit)
MiniImagenet = partial(unsplit, "mini_imagenet")
CIFARFS = partial(unsplit, "cifar_fs")
FC100 = partial(unsplit, "fc100")

omniglot = partial(_omniglot, classification, class_augmentations=ROTATIONS)
miniimagenet = partial(classification, "mini_imagenet")
cifar_fs = partial(classification, "cifar_fs")
fc100 = partial(classification, "fc100")
glyphs = partial(classification, "glyphs")


def Sinusoid(  # noqa: N802 - torchmeta's name
    num_samples_per_task: int,
    num_tasks: int = 1_000_000,
    noise_std: None = None,
    transform: Any = None,
    target_transform: Any = None,
    dataset_transform: Transform | None = None,
    *,
    seed: int | None = None,
) -> MetaDataset:
    """Sine waves to regress, ``num_samples_per_task`` points of each.

    Raises:
        DatasetError: a splitter that asks for more points, or an argument that cannot be honoured.
    """
    only(1_000_000, num_tasks=num_tasks)
    only(None, noise_std=noise_std)
    for name, given in (("transform", transform), ("target_transform", target_transform)):
        if not as_samples_are(given, ()):
            raise DatasetError(f"{name}={given!r} is not supported, only ToTensor1D")
    made = MetaDataset(SinusoidSource(), "sinusoid", "train", 1, _seed(seed))
    if dataset_transform is None:
        return made
    made = _split(made, dataset_transform)
    asked = sum((made.samples or {}).values())
    if asked > num_samples_per_task:
        raise DatasetError(f"a task has {num_samples_per_task} points, not the {asked} asked for")
    return made


def sinusoid(
    shots: int,
    shuffle: bool = True,
    test_shots: int | None = None,
    seed: int | None = None,
    **options: Any,
) -> MetaDataset:
    """Sine waves to regress; as in ``torchmeta.toy.helpers``, with no folder, ways or split.

    Other arguments as for :func:`classification` and :func:`Sinusoid`.
    """
    only(True, shuffle=shuffle)
    only(None, dataset_transform=options.pop("dataset_transform", None))
    points = shots + (shots if test_shots is None else test_shots)
    return _halved(Sinusoid(points, seed=seed, **options), shots, test_shots)


def _halved(dataset: MetaDataset, shots: int, test_shots: int | None) -> MetaDataset:
    query = shots if test_shots is None else test_shots
    return _split(dataset, ClassSplitter(num_train_per_class=shots, num_test_per_class=query))


def _split(dataset: MetaDataset, transform: Any) -> MetaDataset:
    """Raises DatasetError where a transform is no splitter."""
    if not isinstance(transform, Splitter):
        raise DatasetError(
            f"dataset_transform={transform!r} is not supported, only ClassSplitter(...)"
        )
    return transform(dataset)


def _seed(seed: int | None) -> int:
    # From Python's own generator, as torchmeta's sampler: random.seed() makes it repeatable.
    return random.getrandbits(63) if seed is None else seed
