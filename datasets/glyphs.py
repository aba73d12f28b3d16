"""Characters of many scripts, rendered from the fonts that matplotlib ships: nothing to download.

Made for the episodes that Omniglot (Lake et al. 2015) is used for: more than 1,000 characters with
20 samples each, 28x28, and validation and test characters from scripts that training never met.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL
import torch
from PIL import features

from datasets import glyph_rendering
from datasets.base import Dataset, register
from datasets.cache import Tensors, cached
from datasets.episodes import ClassSource, Words, uniform
from datasets.glyph_rendering import (
    FACES,
    NUMBERS,
    SIDE,
    UPRIGHT,
    Bits,
    Face,
    alike,
    distance_field,
    font_path,
    write,
)

SEED = 0
SAMPLES = 20
"""Samples a class."""

SCRIPTS = {
    "train": (
        *("LATIN", "DIGIT", "GREEK", "COPTIC", "CYRILLIC", "OLD ITALIC", "LISU"),
        *("ARABIC", "EXTENDED ARABIC", "CANADIAN"),
    ),
    "val": ("ARMENIAN", "HEBREW", "NKO", "OGHAM"),
    "test": ("GEORGIAN", "LAO", "TIFINAGH"),
}
"""What the Unicode names of a split's characters begin with. Scripts that share letters (Latin,
Greek, Cyrillic, Old Italic) are on one side, and each split has a script that several font families
hold (Latin, Armenian, Georgian) beside some that only one or two do."""

WITHIN = {"furthest": 3.0, "mean_square": math.inf}
"""When two characters of one split look alike: see :func:`alike`; in silhouette pixels, two of
which are one of a sample's. Capital and small letters of one form are at most 3 apart (S s, Z z);
5 and S, which a reader tells apart, are 4, and a letter and the same with another dot are 8."""
ACROSS = {"furthest": 6.0, "mean_square": 1.5}
"""When two characters of different splits do. It goes further, since a test character that passes
for a training character does more harm than a lost class: the Tifinagh Yaw is a U with corners."""

CATEGORIES = frozenset({"Lu", "Ll", "Lt", "Lo", "Nd"})
"""Unicode's letters and digits, without modifier letters and combining marks."""


@register("glyphs")
class Glyphs(Dataset):
    """Letters and digits as classes; whole scripts are held out for validation and test."""

    summary = "letters of 15 scripts, rendered from matplotlib's fonts; needs no download"

    def load(self, split: str) -> ClassSource:
        tensors = cached("glyphs", identity(), lambda: render(choose_characters()))
        code_points = tensors[f"{split}.code_points"].tolist()
        classes = [unicodedata.name(chr(code_point)) for code_point in code_points]
        return ClassSource(tensors[f"{split}.samples"], [SAMPLES] * len(classes), classes)


def identity() -> str:
    """Everything that decides the samples: this code, the fonts, and what draws them."""
    files = [Path(__file__), Path(glyph_rendering.__file__), *map(font_path, FACES)]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return (
        f"code and fonts {digest}, Pillow {PIL.__version__}, "
        f"FreeType {features.version('freetype2')}, Unicode {unicodedata.unidata_version}"
    )


def choose_characters() -> dict[str, list[int]]:
    """The code points of each split, no two of which look alike.

    Characters that look alike are merged into the first of them, and training scripts come first:
    what a held-out script shares with a training script is a training class.
    """
    faces = [Face(stem) for stem in UPRIGHT]
    candidates = _candidates(faces)
    twins = _twins(candidates, faces)
    kept: list[int] = []
    for index in range(len(candidates)):
        drawn = twins[index, index]
        if drawn and not twins[index, kept].any():
            kept.append(index)
    chosen: dict[str, list[int]] = {split: [] for split in SCRIPTS}
    for code_point, split in (candidates[index] for index in kept):
        chosen[split].append(code_point)
    return chosen


def _candidates(faces: Sequence[Face]) -> list[tuple[int, str]]:
    """Every letter and digit of the scripts in the faces, and its split, script by script.

    Characters that decompose are left out: an accented letter is for most of its ink the letter,
    compatibility forms (mathematical, full-width) repeat one, and together they would outnumber
    the rest.
    """
    letters = [
        code_point
        for code_point in sorted(frozenset[int]().union(*(face.code_points for face in faces)))
        if unicodedata.category(chr(code_point)) in CATEGORIES
        and not unicodedata.decomposition(chr(code_point))
    ]
    return [
        (code_point, split)
        for split, scripts in SCRIPTS.items()
        for script in scripts
        for code_point in letters
        if unicodedata.name(chr(code_point), "").startswith(script)
    ]


def _twins(candidates: Sequence[tuple[int, str]], faces: Sequence[Face]) -> Bits:
    """Which candidates look alike in some face that draws both: bool ``(N, N)``, True on the
    diagonal for those that some face draws at all."""
    splits = np.array([split for _, split in candidates])
    twins = np.zeros((len(candidates), len(candidates)), dtype=bool)
    for face in faces:
        drawn = [face.silhouette(code_point) for code_point, _ in candidates]
        here = np.array([index for index, ink in enumerate(drawn) if ink is not None])
        silhouettes = np.stack([ink for ink in drawn if ink is not None])
        same_split = splits[here, None] == splits[here]
        within, across = alike(silhouettes, **WITHIN), alike(silhouettes, **ACROSS)
        twins[np.ix_(here, here)] |= np.where(same_split, within, across)
    return twins


def render(characters: dict[str, list[int]]) -> Tensors:
    """Samples and code points of each split: uint8 ``(classes * SAMPLES, 1, SIDE, SIDE)`` under
    ``<split>.samples``, int64 ``(classes,)`` under ``<split>.code_points``."""
    faces = [Face(stem) for stem in FACES]
    tensors: Tensors = {}
    for split, code_points in characters.items():
        samples = np.stack([specimens(code_point, faces) for code_point in code_points])
        tensors[f"{split}.samples"] = torch.from_numpy(samples).view(-1, 1, SIDE, SIDE)
        tensors[f"{split}.code_points"] = torch.tensor(code_points)
    return tensors


def specimens(code_point: int, faces: Sequence[Face]) -> npt.NDArray[np.uint8]:
    """The samples of one character, ``(SAMPLES, SIDE, SIDE)``; the faces that have it take turns
    in a random order."""
    drawn = [ink for face in faces if (ink := face.silhouette(code_point)) is not None]
    fields = np.stack([distance_field(ink) for ink in drawn])
    words = _words(code_point, len(drawn) + SAMPLES * NUMBERS)
    order = np.argsort(words[: len(drawn)], kind="stable")
    numbers = uniform(words[len(drawn) :]).reshape(SAMPLES, NUMBERS)
    return write(fields[np.resize(order, SAMPLES)], numbers)


def _words(code_point: int, count: int) -> Words:
    """Random words of one character, whatever other characters there are."""
    counter = np.array([0, 0, code_point, 0], dtype=np.uint64)
    words: Words = np.random.Philox(key=SEED, counter=counter).random_raw(count)
    return words
