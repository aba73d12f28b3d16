"""CIFAR-FS and FC100: the 100 classes of CIFAR-100, 600 pictures each at 32x32, split by class.

CIFAR-100: Krizhevsky 2009 (Learning Multiple Layers of Features from Tiny Images). CIFAR-FS:
Bertinetto et al. 2019 (Meta-learning with Differentiable Closed-form Solvers). FC100: Oreshkin et
al. 2018 (TADAM). The training and test pictures of CIFAR-100 are pooled in both.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from datasets import pickles
from datasets.base import Dataset, register
from datasets.cache import cached
from datasets.download import digest, locate
from datasets.episodes import ClassSource, DatasetError

ARCHIVE = "cifar-100-python.tar.gz"
ADDRESS = f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}"
MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
FOLDER = "cifar-100-python"
SHAPE = (3, 32, 32)
MOST_BYTES = 1 << 30
"""Of the archive unpacked, which has 188 MB; more is an archive made to fill the memory."""
MOST_MEMBERS = 1000
VERSION = 1
"""Part of what a cached result is known by: raise it when the pixels come out otherwise."""

COARSE = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
"""Krizhevsky's coarse classes, and the fine ones of each."""
FINE = sorted(" ".join(COARSE.values()).split())
"""In the order of their labels."""

CIFAR_FS_HELD_OUT = {
    "val": (
        "beaver beetle butterfly camel cattle crab crocodile flatfish lamp maple_tree motorcycle "
        "otter sea shark television tractor"
    ),
    "test": (
        "baby bed bicycle chimpanzee fox leopard man pickup_truck plain poppy rocket rose snail "
        "sweet_pepper table telephone wardrobe whale woman worm"
    ),
}
FC100_HELD_OUT = {
    "val": (
        "large_carnivores large_omnivores_and_herbivores non-insect_invertebrates small_mammals"
    ),
    "test": "aquatic_mammals insects medium_mammals people",
}


def splits(held_out: Mapping[str, str], names: Iterable[str]) -> dict[str, list[str]]:
    """The names of each split: those listed, and for training the others."""
    listed = {split: text.split() for split, text in held_out.items()}
    taken = {name for names in listed.values() for name in names}
    return {"train": [name for name in names if name not in taken], **listed}


CIFAR_FS = splits(CIFAR_FS_HELD_OUT, FINE)
FC100 = {
    split: sorted(" ".join(COARSE[name] for name in names).split())
    for split, names in splits(FC100_HELD_OUT, COARSE).items()
}


@register("cifar_fs")
class CIFARFS(Dataset):
    """``<root>/cifar100/cifar-100-python.tar.gz``, in the split of Bertinetto et al."""

    summary = "the classes of CIFAR-100, 32x32, split at random: 64/16/20 classes"
    classes: ClassVar[dict[str, list[str]]] = CIFAR_FS

    def load(self, split: str) -> ClassSource:
        path = self.root / "cifar100" / ARCHIVE
        locate(path, url=ADDRESS, md5=MD5, download=self.download)
        identity = f"cifar100 {VERSION} {digest(path, 'sha256')}"
        pool = cached("cifar100", identity, lambda: by_class(path))
        counts: list[int] = pool["counts"].tolist()
        pictures = dict(zip(FINE, torch.split(pool["images"], counts), strict=True))
        chosen = [pictures[name] for name in self.classes[split]]
        return ClassSource(torch.cat(chosen), [len(each) for each in chosen], self.classes[split])


@register("fc100")
class FewshotCIFAR100(CIFARFS):
    """The same archive, in the split of Oreshkin et al., which keeps coarse classes whole."""

    summary = "the classes of CIFAR-100, 32x32, split by kind: 60/20/20 classes"
    classes = FC100


def by_class(path: Path) -> dict[str, Tensor]:
    """All pictures of the archive in the order of their classes, read without extracting it.

    Returns:
        ``images`` uint8 ``(N, 3, 32, 32)`` and ``counts`` int64 ``(100,)``.

    Raises:
        DatasetError: an archive that is cut short, or not that of CIFAR-100.
    """
    try:
        content = _contents(path, ("meta", "train", "test"))
    # tarfile and the decompressor fail over corrupt data in ways of their own
    except (OSError, EOFError, ValueError, IndexError, tarfile.TarError, zlib.error) as error:
        if isinstance(error, DatasetError):
            raise
        reason = " ".join(str(error).split())
        raise DatasetError(f"{path} is not a whole tar.gz archive ({reason})") from error
    try:
        names = list(content["meta"]["fine_label_names"])
        pictures = [content[part]["data"] for part in ("train", "test")]
        labels = np.concatenate(
            [pickles.integers(content[part]["fine_labels"]) for part in ("train", "test")]
        )
        if not all(isinstance(part, np.ndarray) for part in pictures):
            raise TypeError("not arrays")
        images = np.concatenate(pictures).reshape(len(labels), *SHAPE)
    except (TypeError, KeyError, IndexError, ValueError, OverflowError) as error:
        raise DatasetError(f"{path} does not hold CIFAR-100's pictures and labels") from error
    known = ((labels >= 0) & (labels < len(FINE))).all()
    if names != FINE or not known or images.dtype != np.uint8:
        raise DatasetError(f"{path} does not hold the {len(FINE)} classes of CIFAR-100")
    counts = np.bincount(labels, minlength=len(FINE))
    order = np.argsort(labels, kind="stable")
    return {"images": torch.from_numpy(images[order]), "counts": torch.from_numpy(counts)}


def _contents(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """What files of the archive hold, by their names. Nothing is extracted: no name in the archive
    is ever a place on the disk, and links in it are not followed."""
    wanted = {f"{FOLDER}/{name}": name for name in names}
    content: dict[str, Any] = {}
    with _Unpacked(path) as unpacked, tarfile.open(fileobj=unpacked, mode="r:") as archive:
        members = 0
        while (member := archive.next()) is not None:
            members += 1
            if members > MOST_MEMBERS:
                raise DatasetError(f"{path} has more than {MOST_MEMBERS:,} members")
            name = wanted.get(member.name.removeprefix("./"))
            if name is None:
                continue
            file = archive.extractfile(member) if member.isreg() else None
            if file is None or member.issparse():
                raise DatasetError(f"{path}: {member.name} is not a file, but a link or the like")
            content[name] = pickles.read(file, f"{path}: {member.name}")
    for member_name, name in wanted.items():
        if name not in content:
            raise DatasetError(f"{path} is not CIFAR-100's archive: it has no {member_name}")
    return content


class _Unpacked(gzip.GzipFile):
    """An unpacked file that ends in an error at :data:`MOST_BYTES`, before they are unpacked."""

    def read(self, size: int | None = -1) -> bytes:
        self._reach(self.tell() + (MOST_BYTES + 1 if size is None or size < 0 else size))
        return super().read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._reach(offset)
        return super().seek(offset, whence)

    def _reach(self, place: int) -> None:
        if place > MOST_BYTES:
            raise DatasetError(
                f"{self.name} unpacks to more than {MOST_BYTES >> 20} MiB, which CIFAR-100 does not"
            )
