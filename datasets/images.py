"""Pictures from files to tensors; a picture that cannot be used is named."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL
import torch
from PIL import Image, ImageOps
from torch import Tensor

from datasets.cache import cached
from datasets.episodes import ClassSource, DatasetError

SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
# Named, because Pillow would otherwise try every format it knows, and hand PostScript to
# Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MOST_SIDE = 1 << 16
"""Pixels, as far as JPEG's go: to shrink a picture takes memory for each of its rows and columns,
and one a pixel high can have as many columns as Pillow lets it have pixels."""
VERSION = 1
"""Part of what a cached result is known by: raise it when the pixels come out otherwise."""

Pixels = npt.NDArray[np.uint8]


def photographs(name: str, classes: Mapping[str, Sequence[Path]], size: int) -> ClassSource:
    """A source of colour pictures from files, kept decoded between runs.

    Args:
        name: what the cached file is called after.
        classes: the files of each class.
        size: pixels a side.

    Returns:
        Samples uint8 ``(N, 3, size, size)``.

    Raises:
        DatasetError: a picture that cannot be used; the message has its path.
    """
    paths = [path for files in classes.values() for path in files]
    identity = f"{name} {VERSION} {size} pillow {PIL.__version__}\n{fingerprint(paths)}"

    def build() -> dict[str, Tensor]:
        images = torch.empty((len(paths), 3, size, size), dtype=torch.uint8)
        with bombs_refused(), ThreadPoolExecutor() as pool:
            for index, pixels in enumerate(pool.map(partial(colour, size=size), paths)):
                images[index] = torch.from_numpy(pixels)
        return {"images": images}

    counts = [len(files) for files in classes.values()]
    return ClassSource(cached(name, identity, build)["images"], counts, list(classes))


def fingerprint(paths: Sequence[Path]) -> str:
    """What tells one state of these files from another: their places, sizes and times of change,
    also of the change that puts the time of a modification back."""
    states = ((path.resolve(), path.stat()) for path in paths)
    return "\n".join(
        f"{path}\t{state.st_size}\t{state.st_mtime_ns}\t{state.st_ctime_ns}"
        for path, state in states
    )


@contextmanager
def bombs_refused() -> Iterator[None]:
    """Inside, :func:`decode` refuses any picture with so many pixels that Pillow warns of it.

    Left to itself Pillow raises only from twice that number. Filters of warnings belong to the
    whole process, so this goes around the threads that decode, not into them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def decode(source: Path | bytes, where: str, size: tuple[int, int] | None = None) -> Image.Image:
    """A picture, fully read.

    Args:
        source: a file or its content.
        where: what to call it in a message.
        size: what it must have, if that is known.

    Raises:
        DatasetError: not a picture, or one cut short, corrupt, of another size or an absurd one,
            which is found before its pixels are decoded; names ``where``.
    """
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=FORMATS) as image:
            if size not in (None, image.size):
                raise ValueError(f"it is {image.width}x{image.height}, not {size[0]}x{size[1]}")
            if max(image.size) > MOST_SIDE:
                raise ValueError(f"{image.width}x{image.height} is no size of a picture")
            image.load()
            return image
    except Exception as error:  # each format raises errors of its own over corrupt data
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DatasetError(f"{where} cannot be read as a picture: {reason}") from error


def colour(path: Path, size: int) -> Pixels:
    """One file as uint8 ``(3, size, size)``.

    The whole picture is squeezed into the square, as miniImageNet was made (Lanczos filter):
    cropping would keep its proportions but cut off what may tell its class.
    """
    image = decode(path, str(path))
    if image.mode.startswith(("I", "F")):
        raise DatasetError(f"{path} has {image.mode} pixels; it must have 8 bits a channel")
    try:
        image = _opaque(ImageOps.exif_transpose(image))
        image = image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    except Exception as error:  # over corrupt metadata too
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DatasetError(f"{path} cannot be read as a picture: {reason}") from error
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _opaque(image: Image.Image) -> Image.Image:
    """A picture on white paper: converting alone would show what lies under its transparent parts,
    often black on black."""
    if "transparency" not in image.info and image.mode not in ("LA", "PA", "RGBA"):
        return image
    paper = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(paper, image.convert("RGBA"))
