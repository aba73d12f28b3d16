"""Characters drawn from the fonts that matplotlib ships, and written again by an unsteady hand.

A *silhouette* is one character in one face, scaled so that the longer side of its ink is ``BOX``
pixels and centred on a square of ``CANVAS`` pixels. Handwriting is that silhouette as a distance
field, looked up at displaced positions: a stroke is where the field is above zero, so it can be
made thicker or thinner by adding to the field, and stays smooth when it is bent.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from datasets.episodes import DatasetError

Bits = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

SIDE = 28
"""Height and width of a sample."""
CANVAS = 2 * SIDE
"""Height and width of a silhouette: two of its pixels are one of a sample's."""
BOX = 38
"""The longer side of a silhouette's ink."""

EM = 96
"""Pixels an em at which glyphs are drawn before they are scaled to the box."""
LEAST_INK = EM // 5
"""Pixels that the longer side of a glyph must have: what is smaller is a dot or a mark."""

UPRIGHT = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral")
"""The plain face of each family that has more than ASCII; in these, characters are compared."""
FACES = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *(f"cm{style}10" for style in ("r", "b", "ti", "ss", "tt", "mi")),
)
"""Font files by stem. Computer Modern's symbols (cmsy10, cmex10), the STIX sizes and the STIX
glyphs outside Unicode are left out: their code points do not say what the glyphs are."""

ROTATION = np.deg2rad(15.0)
"""At most, to either side; so for the shear, the shift and the bend."""
SHEAR = 0.25
SCALE = (0.8, 1.1)
"""Of the width and the height, each on its own."""
SHIFT = 2.0
"""In sample pixels."""
BEND = 1.4
"""Elastic displacement of each coordinate, in sample pixels."""
WEIGHT = (-0.2, 0.3)
"""What is added to both sides of a stroke, in sample pixels."""
PRESSURE = 0.25
"""How far the weight strays from that along the strokes of one sample, in sample pixels."""
KNOTS = 4
"""Random values a side from which the displacement and the pressure are interpolated."""
MARGIN = 1.0
"""Sample pixels kept free of ink at the border."""


def font_path(stem: str) -> Path:
    """Where matplotlib keeps a font.

    Raises:
        DatasetError: it does not; some distributions ship matplotlib without its fonts.
    """
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{stem}.ttf"
    if not path.is_file():
        raise DatasetError(f"glyphs is rendered from matplotlib's own fonts; there is no {path}")
    return path


class Face:
    """One font file of matplotlib's, by its stem."""

    def __init__(self, stem: str) -> None:
        path = font_path(stem)
        self._font = ImageFont.truetype(path, EM, layout_engine=ImageFont.Layout.BASIC)
        code_points = FT2Font(str(path)).get_charmap()
        # Computer Modern keeps its accents and Greek letters at the code points of other things.
        ascii_only = stem.startswith("cm")
        self.code_points = frozenset(c for c in code_points if not ascii_only or c < 128)

    @cached_property
    def _missing(self) -> Image.Image:
        return self._draw("\U0010ffff")

    def _draw(self, character: str) -> Image.Image:
        """The character's ink and no more."""
        page = Image.new("L", (4 * EM, 3 * EM))
        ImageDraw.Draw(page).text((EM, EM), character, fill=255, font=self._font)
        return page.crop(page.getbbox() or (0, 0, 0, 0))

    def silhouette(self, code_point: int) -> Bits | None:
        """The character as ink, bool ``(CANVAS, CANVAS)``; None where the face lacks it, has the
        box for missing characters in its place, or has next to no ink."""
        if code_point not in self.code_points:
            return None
        glyph = self._draw(chr(code_point))
        if max(glyph.size) < LEAST_INK or glyph == self._missing:
            return None
        shrink = BOX / max(glyph.size)
        width, height = (max(2, round(side * shrink)) for side in glyph.size)
        canvas = Image.new("L", (CANVAS, CANVAS))
        scaled = glyph.resize((width, height), Image.Resampling.BICUBIC)
        canvas.paste(scaled, ((CANVAS - width) // 2, (CANVAS - height) // 2))
        return np.asarray(canvas) > 127


def alike(silhouettes: Bits, furthest: float, mean_square: float) -> Bits:
    """Which of ``(N, CANVAS, CANVAS)`` look like which, bool ``(N, N)``.

    Two do if the ink of each lies near the other's: no pixel is further from it than ``furthest``
    pixels, and the squared distances have a mean of at most ``mean_square``. Unlike a correlation
    of the pixels, that does not depend on how heavy the strokes are, and feels a missing dot.
    It sums whole numbers, so the answer is the same on every machine.
    """
    limit = furthest**2
    distance = np.stack([ndimage.distance_transform_edt(~ink) for ink in silhouettes])
    squared = np.minimum(np.rint(distance**2), limit + 1).reshape(len(silhouettes), -1)
    ink = silhouettes.reshape(len(silhouettes), -1).astype(np.float32)
    strays = ink @ (squared > limit).astype(np.float32).T
    total = ink @ squared.astype(np.float32).T
    near: Bits = (strays == 0) & (total <= mean_square * ink.sum(axis=1, keepdims=True))
    return near & near.T


def distance_field(silhouette: Bits) -> Floats:
    """Distance to the nearest edge of the ink in sample pixels, above zero inside it:
    ``(CANVAS, CANVAS)``."""
    inside = ndimage.distance_transform_edt(silhouette)
    outside = ndimage.distance_transform_edt(~silhouette)
    # An edge runs half way between the last pixel with ink and the first without; the mean over
    # neighbours takes the stairs out of slanted ones.
    pixels = np.where(silhouette, inside - 0.5, 0.5 - outside)
    field: Floats = ndimage.uniform_filter(pixels, 3, mode="nearest") * (SIDE / CANVAS)
    return field


NUMBERS = 7 + 3 * KNOTS**2
"""Random numbers that decide one sample."""


def write(fields: Floats, numbers: Floats) -> npt.NDArray[np.uint8]:
    """Write each glyph once, with strokes of a random slant, size, place, weight and bend.

    Args:
        fields: distance fields, ``(N, CANVAS, CANVAS)``.
        numbers: in [0, 1), ``(N, NUMBERS)``.

    Returns:
        uint8 ``(N, SIDE, SIDE)``, ink 255 on 0, with none at the border.
    """
    signed = 2 * numbers - 1
    transform = _transform(signed[:, 0], signed[:, 1], _between(SCALE, numbers[:, 2:4]))
    weight = _between(WEIGHT, numbers[:, 4])
    noise = _smooth(signed[:, 7:].reshape(-1, 3, KNOTS, KNOTS))

    free = SIDE / 2 - MARGIN - BEND - PRESSURE - weight[:, None]
    reach = np.einsum("nij,nj->ni", np.abs(transform), _half_extent(fields))
    fit = np.minimum(1.0, (free / reach).min(axis=1))
    transform *= fit[:, None, None]
    shift = signed[:, 5:7] * np.clip(free - reach * fit[:, None], 0.0, SHIFT)

    axis = np.arange(SIDE) - (SIDE - 1) / 2
    position = np.stack(np.meshgrid(axis, axis)) - shift[..., None, None] - BEND * noise[:, :2]
    source = np.einsum("nij,njyx->niyx", np.linalg.inv(transform), position)
    rows_first = source[:, ::-1] * (CANVAS / SIDE) + (CANVAS - 1) / 2
    field = np.stack(
        [
            ndimage.map_coordinates(one, at, order=1, mode="nearest")
            for one, at in zip(fields, rows_first, strict=True)
        ]
    )
    size = np.sqrt(np.linalg.det(transform))[:, None, None]
    ink = 0.5 + field * size + weight[:, None, None] + PRESSURE * noise[:, 2]
    samples: npt.NDArray[np.uint8] = np.rint(255 * ink.clip(0, 1)).astype(np.uint8)
    return samples


def _transform(turn: Floats, slant: Floats, scale: Floats) -> Floats:
    """Scale, then shear, then rotate: ``(N, 2, 2)`` from ``(N,)``, ``(N,)`` and ``(N, 2)``."""
    cos, sin = np.cos(ROTATION * turn), np.sin(ROTATION * turn)
    rotate = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
    shear = np.broadcast_to(np.eye(2), rotate.shape).copy()
    shear[:, 0, 1] = SHEAR * slant
    transform: Floats = rotate @ shear * scale[:, None, :]
    return transform


def _smooth(knots: Floats) -> Floats:
    """Interpolate ``(..., KNOTS, KNOTS)`` to ``(..., SIDE, SIDE)`` within the knots' range."""
    distance = np.abs(np.linspace(0, KNOTS - 1, SIDE)[:, None] - np.arange(KNOTS))
    weights = (1 + np.cos(np.pi * np.minimum(distance, 1))) / 2
    smooth: Floats = weights @ knots @ weights.T
    return smooth


def _half_extent(fields: Floats) -> Floats:
    """Half the ink's width and height in sample pixels, measured from the centre: ``(N, 2)``."""
    from_centre = np.abs(np.arange(CANVAS) - (CANVAS - 1) / 2) + 0.5
    sides = [((fields > 0).any(axis=across) * from_centre).max(axis=1) for across in (1, 2)]
    extent: Floats = np.stack(sides, axis=1) * (SIDE / CANVAS)
    return extent


def _between(limits: tuple[float, float], numbers: Floats) -> Floats:
    low, high = limits
    return low + (high - low) * numbers
