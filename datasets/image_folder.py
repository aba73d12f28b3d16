"""A user's own pictures: a folder a class, in a folder a split."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from datasets.base import Dataset, register
from datasets.episodes import ClassSource, DatasetError
from datasets.images import SUFFIXES, photographs


@register("image_folder")
class ImageFolder(Dataset):
    """``<root>/image_folder/{train,val,test}/<class>/<picture>``, of any common format and size.

    Classes may be of different sizes; each belongs to one split alone. Hidden files, and files that
    are not pictures by their names, are left out.
    """

    summary = "your own pictures, in <root>/image_folder/{train,val,test}/<class>/"
    size: ClassVar[int] = 84
    """Pixels a side that every picture is brought to."""

    def load(self, split: str) -> ClassSource:
        root = self.root / "image_folder"
        folders = _classes(root / split)
        for other in self.splits:
            shared = _classes(root / other).keys() & folders.keys() if other != split else set()
            if shared:
                raise DatasetError(
                    f"{root} has a class {min(shared)!r} in both {split} and {other}; the splits "
                    "of few-shot learning have different classes"
                )
        if not folders:
            raise DatasetError(f"{root / split} must hold a folder of pictures for each class")
        classes = {name: _pictures(folder) for name, folder in folders.items()}
        return photographs("image_folder", classes, self.size)


def _classes(folder: Path) -> dict[str, Path]:
    """The folders of a split by name, in order; none where there is no such split."""
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    return {path.name: path for path in inside if path.is_dir() and path.name[0] != "."}


def _pictures(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    pictures = [path for path in files if path.is_file() and path.name[0] != "."]
    if not pictures:
        raise DatasetError(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))})")
    return pictures
