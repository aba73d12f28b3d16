from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import datasets
from datasets import DatasetError
from datasets.image_folder import ImageFolder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of training pictures, three red and two blue."""
    folder = tmp_path / "image_folder"
    for name, colour, suffixes in (
        ("red", "#f00", ["png", "jpg", "bmp"]),
        ("blue", "#00f", ["GIF", "webp"]),
    ):
        (folder / "train" / name).mkdir(parents=True)
        for suffix in suffixes:
            Image.new("RGB", (90, 40), colour).save(folder / "train" / name / f"a.{suffix}")
    return folder


def load(folder: Path, split: str = "train") -> datasets.ClassSource:
    return ImageFolder(folder.parent).load(split)


def test_classes_of_different_sizes_and_formats_are_read(folder: Path) -> None:
    source = load(folder)
    assert source.classes == ["blue", "red"]
    assert list(source.counts) == [2, 3]
    assert source.sample_shape == (3, 84, 84)
    means = source.samples.float().mean((2, 3))
    assert (means[:2, 2] > 245).all()
    assert (means[2:, 0] > 245).all()


def test_hidden_and_other_files_are_left_out(folder: Path) -> None:
    (folder / "train" / ".git").mkdir()
    (folder / "train" / "notes.txt").write_text("x")
    (folder / "train" / "red" / "._a.png").write_text("x")
    (folder / "train" / "red" / "notes.txt").write_text("x")
    assert list(load(folder).counts) == [2, 3]


def test_the_whole_picture_is_kept_whatever_its_proportions(folder: Path) -> None:
    picture = np.zeros((40, 120, 3), dtype=np.uint8)
    picture[:, :20] = picture[:, -20:] = 255
    Image.fromarray(picture).save(folder / "train" / "red" / "0.png")
    sample = load(folder).samples[2].float()
    assert (sample[:, :, :10] > 250).all()
    assert (sample[:, :, -10:] > 250).all()
    assert (sample[:, :, 30:50] < 5).all()


def test_a_photograph_is_turned_upright(folder: Path) -> None:
    picture = Image.new("RGB", (50, 50), "black")
    picture.paste("white", (0, 0, 50, 25))
    exif = Image.Exif()
    exif[0x0112] = 3  # taken upside down
    picture.save(folder / "train" / "red" / "0.png", exif=exif)
    sample = load(folder).samples[2]
    assert (sample[:, :30] < 5).all()
    assert (sample[:, -30:] > 250).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_parts_are_white_paper(folder: Path, mode: str) -> None:
    drawing = Image.new(mode, (84, 84), (0,) * len(mode))
    drawing.paste((0,) * (len(mode) - 1) + (255,), (0, 0, 42, 84))
    drawing.save(folder / "train" / "red" / "0.png")
    sample = load(folder).samples[2]
    assert (sample[:, :, :40] < 5).all()
    assert (sample[:, :, -40:] > 250).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_other_modes_become_colour(folder: Path, mode: str) -> None:
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new("RGB", (30, 30), "white").convert(mode).save(folder / "train" / "red" / f"0.{suffix}")
    assert (load(folder).samples[2] > 250).all()


def test_an_added_picture_is_noticed(folder: Path) -> None:
    load(folder)
    Image.new("RGB", (90, 40), "white").save(folder / "train" / "red" / "z.png")
    assert list(load(folder).counts) == [2, 4]


def bomb(path: Path) -> None:
    Image.new("1", (12_000, 12_000)).save(path)


def sixteen_bits(path: Path) -> None:
    Image.fromarray(np.full((9, 9), 40_000, dtype=np.uint16)).save(path)


def header_alone(path: Path) -> None:
    """A PNG that says that it has 2**31 - 1 pixels a side, and has none."""
    size = struct.pack(">II", 2**31 - 1, 2**31 - 1) + b"\x08\x02\x00\x00\x00"
    chunk = b"IHDR" + size
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0d" + chunk + struct.pack(">I", zlib.crc32(chunk))
    )


def thread(path: Path) -> None:
    """Below the limit of pixels, but to shrink it would take 4 GB."""
    Image.new("1", (80_000_000, 1)).save(path)


def bad_metadata(path: Path) -> None:
    Image.new("RGB", (9, 9)).save(path, exif=b"Exif\x00\x00no metadata")


def cut_short(path: Path) -> None:
    Image.effect_noise((90, 90), 99).save(path)
    path.write_bytes(path.read_bytes()[:-3000])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b""), "cannot be read as a picture"),
        (header_alone, "cannot be read as a picture"),
        (thread, "80000000x1 is no size of a picture"),
        (bad_metadata, "cannot be read as a picture"),
        (cut_short, "cannot be read as a picture"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50)), "cannot be read"),
        (lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n"), "cannot be read"),
        (bomb, "cannot be read as a picture: Image size"),
        (sixteen_bits, "8 bits a channel"),
    ],
    ids=["empty", "header", "thread", "metadata", "cut", "corrupt", "postscript", "bomb", "16-bit"],
)
def test_a_picture_that_cannot_be_used_is_named(
    folder: Path, make: Callable[[Path], object], message: str
) -> None:
    path = folder / "train" / "red" / "bad.png"
    make(path)
    with pytest.raises(DatasetError, match=message) as caught:
        load(folder)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_split_is_named(folder: Path) -> None:
    with pytest.raises(DatasetError, match="must hold a folder of pictures") as caught:
        load(folder, "val")
    assert str(folder / "val") in str(caught.value)


def test_an_empty_class_is_named(folder: Path) -> None:
    (folder / "train" / "green").mkdir()
    with pytest.raises(DatasetError, match="holds no pictures") as caught:
        load(folder)
    assert str(folder / "train" / "green") in str(caught.value)


def test_a_class_in_two_splits_is_refused(folder: Path) -> None:
    (folder / "test" / "red").mkdir(parents=True)
    with pytest.raises(DatasetError, match="a class 'red' in both train and test"):
        load(folder)


def test_an_episode_takes_the_same_shots_of_unequal_classes(folder: Path) -> None:
    batch = datasets.loader("image_folder", ways=2, shots=1, test_shots=1, root=folder.parent)[0]
    assert batch["train"][0].shape == (1, 2, 3, 84, 84)
    with pytest.raises(DatasetError, match="a class with 2"):
        datasets.loader("image_folder", ways=2, shots=1, test_shots=2, root=folder.parent)


def test_a_name_that_is_no_text_is_one_as_well(folder: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(folder / "train" / "red") + b"/\xff.png"))
    (folder / "train" / "red" / "a.png").rename(path)
    assert list(load(folder).counts) == [2, 3]
    path.write_bytes(b"")
    with pytest.raises(DatasetError, match="cannot be read as a picture"):
        load(folder)


def test_a_pipe_is_no_picture(folder: Path) -> None:
    os.mkfifo(folder / "train" / "red" / "pipe.png")
    assert list(load(folder).counts) == [2, 3]


def test_folders_of_one_name_in_two_places_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where their files' sizes and times are the same, as archives unpack them."""
    for place, colour in (("one", (255, 0, 0)), ("other", (0, 0, 255))):
        for name in ("a", "b"):
            path = tmp_path / place / "data" / "image_folder" / "train" / name / "0.bmp"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (8, 8), colour).save(path)
            os.utime(path, (0, 0))
    found = []
    for place in ("one", "other"):
        monkeypatch.chdir(tmp_path / place)
        found.append(ImageFolder("data").load("train").samples[0, :, 0, 0].tolist())
    assert found == [[255, 0, 0], [0, 0, 255]]
