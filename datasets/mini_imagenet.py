"""miniImageNet: 100 classes of ImageNet with 600 pictures each, at 84x84.

Vinyals et al. 2016 (Matching Networks), with the classes and the split of Ravi & Larochelle 2017
(Optimization as a Model for Few-Shot Learning). ImageNet's terms forbid passing its pictures on, so
there is no address to download from.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from datasets import pickles
from datasets.base import Dataset, register
from datasets.episodes import ClassSource, DatasetError
from datasets.images import SUFFIXES, photographs

SIDE = 84
SHAPE = f"(N, {SIDE}, {SIDE}, 3)"
WNID = 9
"""Letters of a WordNet id, with which the name of a picture begins: n01532829..."""

SPLITS = {
    "train": """
        n01532829 n01558993 n01704323 n01749939 n01770081 n01843383 n01910747 n02074367 n02089867
        n02091831 n02101006 n02105505 n02108089 n02108551 n02108915 n02111277 n02113712 n02120079
        n02165456 n02457408 n02606052 n02687172 n02747177 n02795169 n02823428 n02966193 n03017168
        n03047690 n03062245 n03207743 n03220513 n03337140 n03347037 n03400231 n03476684 n03527444
        n03676483 n03838899 n03854065 n03888605 n03908618 n03924679 n03998194 n04067472 n04243546
        n04251144 n04258138 n04275548 n04296562 n04389033 n04435653 n04443257 n04509417 n04515003
        n04596742 n04604644 n04612504 n06794110 n07584110 n07697537 n07747607 n09246464 n13054560
        n13133613""",
    "val": """
        n01855672 n02091244 n02114548 n02138441 n02174001 n02950826 n02971356 n02981792 n03075370
        n03417042 n03535780 n03584254 n03770439 n03773504 n03980874 n09256479""",
    "test": """
        n01930112 n01981276 n02099601 n02110063 n02110341 n02116738 n02129165 n02219486 n02443484
        n02871525 n03127925 n03146219 n03272010 n03544143 n03775546 n04146614 n04149813 n04418357
        n04522168 n07613480""",
}
CLASSES = {split: wnids.split() for split, wnids in SPLITS.items()}


@register("mini_imagenet")
class MiniImageNet(Dataset):
    """One of the forms it is passed around in, under ``<root>/mini_imagenet``.

    - ``mini-imagenet-cache-{train,val,test}.pkl``: ``image_data`` uint8 ``(N, 84, 84, 3)`` and
      ``class_dict``, the rows of each class; or
    - ``images/``, pictures of any size whose names begin with their class, in one folder, in one a
      class, or in one a split and a class, with or without Ravi & Larochelle's
      ``{train,val,test}.csv`` (``filename,label``) beside it, which say which are in use.
    """

    summary = "100 classes of ImageNet, 84x84, Ravi & Larochelle's split, 64/16/20 classes"

    def load(self, split: str) -> ClassSource:
        folder = self.root / "mini_imagenet"
        cache, images = folder / f"mini-imagenet-cache-{split}.pkl", folder / "images"
        if cache.is_file():
            return from_pickle(cache, CLASSES[split])
        if not images.is_dir():
            raise DatasetError(
                f"neither {cache} nor {images} is there; miniImageNet cannot be downloaded, one of "
                "them must be put there"
            )
        table = folder / f"{split}.csv"
        files = listed(table, images) if table.is_file() else found(images)
        classes = {wnid: files.get(wnid, []) for wnid in CLASSES[split]}
        empty = [wnid for wnid, paths in classes.items() if not paths]
        if empty:
            raise DatasetError(
                f"{table if table.is_file() else images} has no pictures of {empty[0]}, nor of "
                f"{len(empty) - 1} more of the {len(classes)} classes of the {split} split"
            )
        return photographs("mini_imagenet", classes, SIDE)


def from_pickle(path: Path, wnids: list[str]) -> ClassSource:
    """A split from its pickled cache; there is nothing to decode, so none is kept."""
    with path.open("rb") as file:
        content = pickles.read(file, str(path))
    images, rows = _checked(content, path)
    if set(rows) != set(wnids):
        raise DatasetError(
            f"{path} has {len(rows)} classes that are not the {len(wnids)} of Ravi & Larochelle's "
            "split"
        )
    order = np.concatenate([rows[wnid] for wnid in wnids])
    samples = torch.empty((len(order), 3, SIDE, SIDE), dtype=torch.uint8)
    for sample, row in zip(samples, order, strict=True):
        sample.copy_(torch.from_numpy(images[row]).permute(2, 0, 1))
    return ClassSource(samples, [len(rows[wnid]) for wnid in wnids], wnids)


def _checked(content: Any, path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The pictures ``(N, 84, 84, 3)`` and the rows of each class of a pickled cache."""
    try:
        images, classes = content["image_data"], dict(content["class_dict"].items())
    except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
        raise DatasetError(f"{path} must hold image_data and class_dict") from error
    if not isinstance(images, np.ndarray):
        raise DatasetError(f"image_data of {path} is no array; it must be uint8 {SHAPE}")
    if images.dtype != np.uint8 or images.shape[1:] != (SIDE, SIDE, 3):
        raise DatasetError(
            f"image_data of {path} is {images.dtype} {images.shape}; it must be uint8 {SHAPE}"
        )
    rows = {str(wnid): _rows(at, len(images), f"{wnid}"[:20], path) for wnid, at in classes.items()}
    every = np.concatenate([*rows.values(), np.empty(0, np.int64)])
    if every.size > len(images) or np.unique(every).size < every.size:
        raise DatasetError(f"class_dict of {path} has a row of image_data twice")
    return images, rows


def _rows(at: Any, count: int, wnid: str, path: Path) -> npt.NDArray[np.integer[Any]]:
    """The rows of a class, if there are such."""
    try:
        rows = pickles.integers(at)
        if not ((rows >= 0) & (rows < count)).all():
            raise ValueError("out of bounds")
    except (ValueError, OverflowError) as error:
        raise DatasetError(
            f"class_dict of {path} has rows of {wnid} that image_data has not"
        ) from error
    return rows


def found(images: Path) -> dict[str, list[Path]]:
    """The pictures in a folder, one folder further down, or two (a split's and a class's), by the
    class their names begin with; one that is there several times is one picture."""
    there = [*images.glob("*/n*/n*.*"), *images.glob("n*/n*.*"), *images.glob("n*.*")]
    by_name = {path.name: path for path in there if path.suffix.lower() in SUFFIXES}
    classes: dict[str, list[Path]] = {}
    for name in sorted(by_name):
        if by_name[name].is_file():
            classes.setdefault(name[:WNID], []).append(by_name[name])
    return classes


def listed(table: Path, images: Path) -> dict[str, list[Path]]:
    """The pictures that a table names, by class."""
    present = {path.name: path for paths in found(images).values() for path in paths}
    classes: dict[str, list[Path]] = {}
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, skipinitialspace=True)
            if not {"filename", "label"} <= set(rows.fieldnames or ()):
                raise DatasetError(f"{table} must begin with the line 'filename,label'")
            for row in rows:
                path = present.pop(row["filename"], None)  # each once: a table cannot fill memory
                if path is None:
                    name = str(row["filename"])[:100]
                    raise DatasetError(
                        f"{table} lists {name!r}, which {images} has not, or the table twice"
                    )
                classes.setdefault(str(row["label"]), []).append(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{table} cannot be read as a table: {error}") from error
    return classes
