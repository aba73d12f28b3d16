from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import datasets
from datasets import DatasetError
from datasets.mini_imagenet import CLASSES, MiniImageNet

VAL = CLASSES["val"]


def shade(number: int, copy: int) -> tuple[int, int, int]:
    """A colour that tells class and copy."""
    return 10 * number, 100 * copy, 255 - 10 * number


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "mini_imagenet"
    (folder / "images").mkdir(parents=True)
    return folder


def write_images(folder: Path, nested: bool = False, copies: int = 2) -> None:
    for number, wnid in enumerate(VAL):
        for copy in range(copies):
            path = folder / "images" / (wnid if nested else "") / f"{wnid}{copy + 1:08}.jpg"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (100, 60), shade(number, copy)).save(path, quality=95)


def write_pickle(folder: Path, protocol: int = 2, **changes: Any) -> Path:
    colours = [shade(number, copy) for copy in range(2) for number in range(len(VAL))]
    images = np.zeros((len(colours), 84, 84, 3), dtype=np.uint8)
    images[:] = np.array(colours, dtype=np.uint8)[:, None, None]
    content = {
        "image_data": images,
        "class_dict": {wnid: [n, n + len(VAL)] for n, wnid in enumerate(VAL)},
    }
    path = folder / "mini-imagenet-cache-val.pkl"
    path.write_bytes(pickle.dumps(content | changes, protocol))
    return path


def test_the_classes_are_64_16_and_20_and_no_split_shares_one() -> None:
    assert {split: len(classes) for split, classes in CLASSES.items()} == {
        "train": 64,
        "val": 16,
        "test": 20,
    }
    assert len({wnid for classes in CLASSES.values() for wnid in classes}) == 100


def assert_shades(source: datasets.ClassSource, copies: int, tolerance: int) -> None:
    assert source.classes == VAL
    assert list(source.counts) == [copies] * len(VAL)
    assert source.sample_shape == (3, 84, 84)
    for index, sample in enumerate(source.samples.numpy()):
        wanted = np.array(shade(*divmod(index, copies)))[:, None, None]
        assert np.abs(sample.astype(int) - wanted).max() <= tolerance


@pytest.mark.parametrize("nested", [False, True])
def test_pictures_in_one_folder_or_in_one_a_class_are_read(folder: Path, nested: bool) -> None:
    write_images(folder, nested)
    assert_shades(MiniImageNet(folder.parent).load("val"), copies=2, tolerance=4)


def test_a_table_says_which_pictures_are_in_use(folder: Path) -> None:
    write_images(folder)
    rows = [f"{wnid}{1:08}.jpg,{wnid}" for wnid in VAL]
    (folder / "val.csv").write_text("\n".join(["filename,label", *rows]))
    assert_shades(MiniImageNet(folder.parent).load("val"), copies=1, tolerance=4)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickled_cache_is_read(folder: Path, protocol: int) -> None:
    write_pickle(folder, protocol)
    assert_shades(MiniImageNet(folder.parent).load("val"), copies=2, tolerance=0)


def test_pictures_are_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(folder)
    first = MiniImageNet(folder.parent).load("val")
    with monkeypatch.context() as patch:
        patch.delattr(Image, "open")
        again = MiniImageNet(folder.parent).load("val")
    assert (again.samples == first.samples).all()


def test_a_changed_picture_is_decoded_again(folder: Path) -> None:
    write_images(folder)
    before = MiniImageNet(folder.parent).load("val")
    path = folder / "images" / f"{VAL[0]}{1:08}.jpg"
    Image.new("RGB", (84, 84), "white").save(path)
    os.utime(path, ns=(1, 1))
    after = MiniImageNet(folder.parent).load("val")
    assert (after.samples[0] >= 250).all()
    assert (after.samples[1:] == before.samples[1:]).all()


def test_pictures_in_a_folder_a_split_are_read(folder: Path) -> None:
    write_images(folder, nested=True)
    (folder / "images").rename(folder / "val")
    (folder / "images").mkdir()
    (folder / "val").rename(folder / "images" / "val")
    assert_shades(MiniImageNet(folder.parent).load("val"), copies=2, tolerance=3)


def test_a_picture_that_is_there_twice_is_one(folder: Path) -> None:
    write_images(folder, nested=False)
    write_images(folder, nested=True)
    assert_shades(MiniImageNet(folder.parent).load("val"), copies=2, tolerance=3)


def test_an_episode_can_be_drawn(folder: Path) -> None:
    write_images(folder)
    batch = datasets.loader(
        "mini_imagenet", ways=5, shots=1, test_shots=1, split="val", root=folder.parent
    )[0]
    assert batch["train"][0].shape == (1, 5, 3, 84, 84)


def broken(folder: Path) -> Iterator[tuple[str, str]]:
    """One after the other, states of the folder and what is said of each."""
    yield "neither", "cannot be downloaded"
    write_images(folder)
    for path in (folder / "images").glob(f"{VAL[3]}*"):
        path.unlink()
    yield VAL[3], "has no pictures of"
    write_images(folder)
    table = folder / "val.csv"
    table.write_text("name\nx\n")
    yield str(table), "filename,label"
    table.write_bytes(b"filename,label\n\xff,n1\n")
    yield str(table), "cannot be read as a table"
    table.write_text("filename,label\n" + "x" * 200_000 + ",n1\n")
    yield str(table), "cannot be read as a table"
    twice = f"{VAL[0]}{1:08}.jpg,{VAL[0]}\n"
    table.write_text(f"filename,label\n{twice}{twice}")
    yield str(table), "or the table twice"
    table.write_text("filename,label\n../../etc/passwd,n1\n")
    yield str(table), "'../../etc/passwd'"
    table.write_text(f"filename,label\n{VAL[0]}{1:08}.jpg,{VAL[0]}\n")
    yield str(table), "nor of 14 more"
    table.unlink()
    path = folder / "images" / f"{VAL[5]}{1:08}.jpg"
    path.write_bytes(path.read_bytes()[:200])
    yield str(path), "cannot be read as a picture"


def test_what_is_missing_or_broken_is_named(folder: Path) -> None:
    (folder / "images").rmdir()
    states = broken(folder)
    for where, message in states:
        with pytest.raises(DatasetError, match=message) as caught:
            MiniImageNet(folder.parent).load("val")
        assert where in str(caught.value)
        assert "\n" not in str(caught.value)
        (folder / "images").mkdir(exist_ok=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_data": np.zeros((4, 64, 64, 3), dtype=np.uint8)}, "must be uint8"),
        ({"image_data": np.zeros((4, 84, 84, 3), dtype=np.float32)}, "must be uint8"),
        ({"image_data": "no"}, "must be uint8"),
        ({"class_dict": {VAL[0]: [0, 2**70]}}, "has rows of n01855672"),
        ({"class_dict": {VAL[0]: [[0]]}}, "has rows of n01855672"),
        ({"class_dict": dict.fromkeys(VAL, np.zeros(9**6, int))}, "a row of image_data twice"),
        ({"class_dict": {VAL[0]: [0, 1], VAL[1]: [1]}}, "a row of image_data twice"),
        ({"class_dict": [1]}, "must hold image_data and class_dict"),
        ({"class_dict": {VAL[0]: [0, 99]}}, "has rows of n01855672 that image_data has not"),
        ({"class_dict": {VAL[0]: ["a"]}}, "has rows of n01855672"),
        ({"class_dict": {VAL[0]: [0]}}, "1 classes that are not the 16"),
        ({"class_dict": {f"x{n}": [] for n in range(16)}}, "16 classes that are not the 16"),
    ],
)
def test_a_pickled_cache_of_something_else_is_named(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    path = write_pickle(folder, **changes)
    with pytest.raises(DatasetError, match=message) as caught:
        MiniImageNet(folder.parent).load("val")
    assert str(path) in str(caught.value)


def test_a_pickled_cache_cannot_run_code(folder: Path) -> None:
    class Exploit:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(folder / "proof"),)

    path = write_pickle(folder, class_dict=Exploit())
    with pytest.raises(DatasetError, match=r"asks for \w+.mkdir") as caught:
        MiniImageNet(folder.parent).load("val")
    assert str(path) in str(caught.value)
    assert not (folder / "proof").exists()
