"""Data for few-shot learning: deterministic episodes in torchmeta's batches.

Not to be confused with Hugging Face's package of the same name; see the README.
"""

from __future__ import annotations

from pathlib import Path

import torch

from datasets.base import Dataset, get, names, register
from datasets.episodes import (
    Batch,
    ClassSource,
    DatasetError,
    EpisodeLoader,
    EpisodeSpec,
    Source,
    collate,
)

__all__ = [
    "Batch",
    "ClassSource",
    "Dataset",
    "DatasetError",
    "EpisodeLoader",
    "EpisodeSpec",
    "Source",
    "collate",
    "get",
    "loader",
    "names",
    "register",
]


def loader(
    name: str,
    *,
    ways: int = 5,
    shots: int = 1,
    test_shots: int = 15,
    split: str = "train",
    batch_size: int = 1,
    seed: int = 0,
    protocol: str = "independent",
    device: torch.device | str = "cpu",
    root: Path | str | None = None,
    download: bool = False,
) -> EpisodeLoader:
    """Batches of episodes of a registered dataset; ``loader[i]`` is batch ``i``.

    Args:
        name: a name from :func:`names`.
        ways: classes an episode (of regression, which has none, a part of its address alone).
        shots: support samples a class.
        test_shots: query samples a class.
        split: ``"train"``, ``"val"`` or ``"test"``.
        batch_size: tasks a batch, B.
        seed: which stream of episodes.
        protocol: ``"independent"``, without end, or ``"disjoint"``, of which no two episodes share
            a sample; see :class:`EpisodeSpec`.
        device: where the data is held and the batches are made.
        root: folder of the data sets; see :class:`Dataset`.
        download: fetch what is missing, where the dataset knows an address.

    Returns:
        Batches with inputs float32 ``(B, ways*shots, *sample_shape)`` and targets int64
        ``(B, ways*shots)``, or float32 ``(B, shots, out)`` for regression; besides ``"train"`` and
        ``"test"``, those of classes have ``"classes"`` (:data:`datasets.episodes.Batch`).

    Raises:
        DatasetError: an unknown name or split, data that is absent or broken, or episodes that the
            split is too small for.
    """
    dataset = get(name)(root=root, download=download)
    if split not in dataset.splits:
        raise DatasetError(f"{name} has no {split!r} split; it has {', '.join(dataset.splits)}")
    spec = EpisodeSpec(name, split, ways, shots, test_shots, seed, protocol)
    return EpisodeLoader(dataset.load(split).to(device), spec, batch_size)
