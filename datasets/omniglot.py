"""Omniglot: 1,623 handwritten characters of 50 alphabets, each drawn by 20 people.

Lake, Salakhutdinov, Tenenbaum: Human-level concept learning through probabilistic program
induction, Science 2015; the archives are those of https://github.com/brendenlake/omniglot.

Drawings are inverted (ink 1 on 0) and brought from 105x105 to 28x28 with Pillow's bilinear filter,
which averages over the pixels that fall together; that is what torchmeta does, pixel for pixel.
(The MAML paper's script asks for Lanczos, but Pillow takes the nearest pixel for one-bit images,
which breaks thin strokes.)

Every character is four classes: itself and its rotations by 90, 180 and 270 degrees. They are made
after the split, so that a character and its rotations are in one split, and in all splits alike, as
in the code of MAML and of torchmeta.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from torch import Tensor

from datasets.base import Dataset, register
from datasets.cache import cached
from datasets.download import digest, locate
from datasets.episodes import ClassSource, DatasetError, Source
from datasets.images import Pixels, bombs_refused, decode
from datasets.omniglot_runs import RUNS, Runs, answers, members

ADDRESS = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
MD5 = {
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
}
RUNS_ARCHIVE = "one-shot-classification/all_runs.zip"
RUNS_MD5 = "e8996daecdf12afeeb4a53a179f06b19"
LAYOUT = re.compile(r"(?P<character>(?!\.)[^/\\\x00-\x1f]+/character\d\d)/\d{4}_\d\d\.png")
DRAWN = (105, 105)
SIDE = 28
MOST_BYTES = 1 << 20
"""Of one drawing; they have some hundred. More is an archive made to fill the memory."""
MOST_BYTES_IN_ALL = 1 << 28
"""Of the drawings of an archive; they have 4 million."""
MOST_MEMBERS = 100_000
"""Of an archive; they have some 20,000."""
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Those of which Python unpacks no more than is asked for."""
UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error)
"""What zipfile raises over what it cannot read; a RuntimeError is an encrypted member or an unknown
compression, a ValueError a name or a place that cannot be."""
VERSION = 1
"""Part of what a cached result is known by: raise it when the pixels come out otherwise."""

CHARACTERS = 1623
TEST = 423
MAML_TRAIN = 1100
MAML_SEED = 1
VALIDATION_ALPHABETS = frozenset(
    ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")
)

Characters = Sequence[str]
"""As ``Alphabet/characterNN``, in order."""


def vinyals(background: Characters, evaluation: Characters) -> dict[str, Characters]:
    """1,028 / 172 / 423 characters, after Vinyals et al. 2016 (Matching Networks).

    In order of alphabet, background alphabets first: the last 423 are for the test, five whole
    alphabets of the rest for validation. (As torchmeta lists them.)
    """
    characters = _all(background, evaluation)
    rest, test = characters[:-TEST], characters[-TEST:]
    held_out = [character.split("/")[0] in VALIDATION_ALPHABETS for character in rest]
    return {
        "train": [character for character, held in zip(rest, held_out, strict=True) if not held],
        "val": [character for character, held in zip(rest, held_out, strict=True) if held],
        "test": test,
    }


def maml(background: Characters, evaluation: Characters) -> dict[str, Characters]:
    """1,100 / 100 / 423 characters at random, seed 1, after Finn et al. 2017 (MAML).

    The paper's own draw cannot be had: its code shuffles, with seed 1, what the file system lists
    in an order of its own. Here the characters in order are ranked by the words of Philox, key 1.
    """
    characters = _all(background, evaluation)
    order = np.argsort(np.random.Philox(key=MAML_SEED).random_raw(CHARACTERS), kind="stable")
    shuffled = [characters[index] for index in order]
    return {
        "train": shuffled[:MAML_TRAIN],
        "val": shuffled[MAML_TRAIN:-TEST],
        "test": shuffled[-TEST:],
    }


def lake(background: Characters, evaluation: Characters) -> dict[str, Characters]:
    """964 / 659 characters: background against evaluation alphabets, as Lake et al. 2015."""
    return {"train": background, "test": evaluation}


def _all(background: Characters, evaluation: Characters) -> list[str]:
    characters = [*background, *evaluation]
    if len(characters) != CHARACTERS:
        raise DatasetError(
            f"the Omniglot archives hold {len(characters)} characters; this split is defined "
            f"over all {CHARACTERS}"
        )
    return characters


@register("omniglot")
class Omniglot(Dataset):
    """``<root>/omniglot/images_{background,evaluation}.zip``, in the split of Vinyals et al."""

    summary = "handwritten characters, 28x28, Vinyals's split: 1028/172/423, four rotations each"
    divide = staticmethod(vinyals)

    def load(self, split: str) -> Source:
        paths = [
            locate(
                self.root / "omniglot" / f"{name}.zip",
                url=f"{ADDRESS}/{name}.zip",
                md5=md5,
                download=self.download,
            )
            for name, md5 in MD5.items()
        ]
        listings = [drawings(path) for path in paths]
        characters = self.divide(*(list(listing) for listing in listings))[split]
        images = _decoded(paths, listings)
        counts = {name: len(files) for listing in listings for name, files in listing.items()}
        pictures = dict(zip(counts, torch.split(images, list(counts.values())), strict=True))
        return rotated({character: pictures[character] for character in characters})


@register("omniglot_maml")
class OmniglotMAML(Omniglot):
    """The same in a random split, as in the MAML paper."""

    summary = "Omniglot, a random split as in the MAML paper: 1100/100/423, four rotations each"
    divide = staticmethod(maml)


@register("omniglot_lake")
class OmniglotLake(Omniglot):
    """The same in the split of its authors, which has no validation classes; its split ``runs`` is
    their one-shot challenge, ``<root>/omniglot/all_runs.zip``."""

    summary = "Omniglot, background against evaluation alphabets: 964/659, four rotations each"
    splits = ("train", "test", "runs")
    divide = staticmethod(lake)

    def load(self, split: str) -> Source:
        if split != "runs":
            return super().load(split)
        path = locate(
            self.root / "omniglot" / "all_runs.zip",
            url=f"{ADDRESS}/{RUNS_ARCHIVE}",
            md5=RUNS_MD5,
            download=self.download,
        )
        return one_shot_runs(path)


def one_shot_runs(path: Path) -> Runs:
    """The runs of the one-shot challenge, from its archive.

    Raises:
        DatasetError: not a zip archive, or not the one of the runs.
    """
    files = _read(path, members())
    labels = [answers(content, where) for where, content in files if where.endswith(".txt")]
    with bombs_refused():
        images = [_drawing(entry) for entry in files if entry[0].endswith(".png")]
    pictures = torch.from_numpy(np.stack(images)).view(RUNS, 2, -1, 1, SIDE, SIDE)
    return Runs(pictures[:, 0], pictures[:, 1], torch.tensor(labels))


def drawings(path: Path) -> dict[str, list[str]]:
    """The members of an archive by character, characters and drawings in order.

    Raises:
        DatasetError: not a zip archive, or not one of Omniglot's.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = sorted(set(archive.namelist()))
    except UNREADABLE as error:
        raise DatasetError(f"{path} is not a whole zip archive ({error})") from error
    if len(members) > MOST_MEMBERS:
        raise DatasetError(f"{path} has more than {MOST_MEMBERS:,} members")
    layout = f"{path.stem}/Alphabet/characterNN/NNNN_NN.png"
    found: dict[str, list[str]] = {}
    for member in members:
        folder, _, inner = member.partition("/")
        hidden = member.rpartition("/")[2].startswith(".")
        if folder == "__MACOSX" or hidden or not member.endswith(".png"):
            continue  # folders, and what an operating system leaves in an archive
        match = LAYOUT.fullmatch(inner)
        if folder != path.stem or match is None:
            raise DatasetError(f"{path} holds {member!r}; its drawings must be {layout}")
        found.setdefault(match["character"], []).append(member)
    if not found:
        raise DatasetError(f"{path} holds no drawings; there must be {layout}")
    # Not the members' order: "/" sorts after some characters of names.
    return dict(sorted(found.items(), key=lambda entry: entry[0].split("/")))


def _decoded(paths: Sequence[Path], listings: Sequence[dict[str, list[str]]]) -> Tensor:
    """Every drawing of the archives, in the order of the listings: uint8 ``(N, 28, 28)``."""
    checksums = " ".join(digest(path, "sha256") for path in paths)

    def build() -> dict[str, Tensor]:
        parts = [pictures(path, listing) for path, listing in zip(paths, listings, strict=True)]
        return {"images": torch.cat(parts)}

    identity = f"omniglot {VERSION} {SIDE} pillow {PIL.__version__} {checksums}"
    return cached("omniglot", identity, build)["images"]


def pictures(path: Path, listing: dict[str, list[str]]) -> Tensor:
    """Every drawing of an archive, in the order of the listing: uint8 ``(N, 28, 28)``.

    Raises:
        DatasetError: an archive or a drawing that cannot be read; names it.
    """
    encoded = _read(path, [member for files in listing.values() for member in files])
    with bombs_refused():
        return torch.from_numpy(np.stack([_drawing(entry) for entry in encoded]))


def _read(path: Path, members: Sequence[str]) -> list[tuple[str, bytes]]:
    """What to call each member in a message, and its content. Nothing is extracted to disk."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in members:
                if member not in archive.NameToInfo:
                    raise DatasetError(f"{path} holds no {member!r}")
            entries = [archive.getinfo(member) for member in members]
            for entry in entries:
                if entry.file_size > MOST_BYTES:
                    raise DatasetError(f"{path}: {entry.filename} is too large to be a drawing")
                if entry.compress_type not in COMPRESSIONS:
                    raise DatasetError(f"{path}: {entry.filename} is neither stored nor deflated")
            if sum(entry.file_size for entry in entries) > MOST_BYTES_IN_ALL:
                raise DatasetError(f"{path} unpacks to more than {MOST_BYTES_IN_ALL >> 20} MiB")
            return [(f"{path}: {entry.filename}", _content(archive, entry)) for entry in entries]
    except DatasetError:
        raise
    except UNREADABLE as error:
        raise DatasetError(f"{path} is corrupt ({error})") from error


def _content(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """A member, unpacked no further than it says that it goes."""
    with archive.open(entry) as file:
        return file.read(entry.file_size + 1)


def _drawing(entry: tuple[str, bytes]) -> Pixels:
    where, data = entry
    image = decode(data, where, DRAWN)
    ink = ImageOps.invert(image.convert("L"))
    return np.asarray(ink.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def rotated(pictures: dict[str, Tensor]) -> ClassSource:
    """A source with four classes for each: upright, then by 90, 180 and 270 degrees anticlockwise.

    Args:
        pictures: of each class, uint8 ``(n, 28, 28)``.
    """
    upright = torch.cat(list(pictures.values()))
    samples = torch.cat([upright.rot90(turns, (1, 2)) for turns in range(4)])
    counts = [len(images) for images in pictures.values()] * 4
    classes = [f"{name}/rot{90 * turns:03}" for turns in range(4) for name in pictures]
    originals = [*range(len(pictures))] * 4
    return ClassSource(samples[:, None], counts, classes, originals)


def upright(source: ClassSource) -> ClassSource:
    """The classes of a :func:`rotated` source that are not turned."""
    count = len(source.counts) // 4
    counts = source.counts[:count]
    return ClassSource(source.samples[: sum(counts)], counts, source.classes[:count])
