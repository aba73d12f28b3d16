from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import datasets
from datasets import DatasetError
from datasets.cifar_fs import CIFAR_FS, CIFARFS, COARSE, FC100, FINE

Content = dict[str, Any]


def pictures(copies: int) -> Content:
    """A part of CIFAR-100 in which a picture's red is its label, with the labels mixed."""
    labels = np.random.default_rng(copies).permutation(np.repeat(np.arange(100), copies))
    data = np.zeros((len(labels), 3, 1024), dtype=np.uint8)
    data[:, 0] = labels[:, None]
    return {"data": data.reshape(-1, 3072), "fine_labels": labels.tolist()}


def write(root: Path, **changes: Any) -> Path:
    content = {"meta": {"fine_label_names": FINE}, "train": pictures(3), "test": pictures(1)}
    path = root / "cifar100" / "cifar-100-python.tar.gz"
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, value in (content | changes).items():
            data = pickle.dumps(value, 2)
            member = tarfile.TarInfo(f"cifar-100-python/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("split", "sizes"), [(CIFAR_FS, [64, 16, 20]), (FC100, [60, 20, 20])], ids=["cifar_fs", "fc100"]
)
def test_splits_share_no_class_and_leave_none_out(
    split: dict[str, list[str]], sizes: list[int]
) -> None:
    assert [len(split[name]) for name in ("train", "val", "test")] == sizes
    assert sorted(name for names in split.values() for name in names) == FINE


def test_there_are_100_classes_in_20_kinds() -> None:
    assert len(FINE) == len(set(FINE)) == 100
    assert len(COARSE) == 20
    assert FINE[0] == "apple"
    assert FINE[-1] == "worm"


def test_fc100_keeps_kinds_whole() -> None:
    for names in COARSE.values():
        homes = [split for split, classes in FC100.items() if set(names.split()) & set(classes)]
        assert len(homes) == 1
    assert {"beaver", "bee", "fox", "baby"} <= set(FC100["test"])
    assert {"bear", "camel", "crab", "hamster"} <= set(FC100["val"])


@pytest.mark.parametrize("name", ["cifar_fs", "fc100"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_training_and_test_pictures_are_pooled_by_class(
    tmp_path: Path, name: str, split: str
) -> None:
    write(tmp_path)
    dataset = datasets.get(name)
    source = dataset(tmp_path).load(split)
    assert isinstance(source, datasets.ClassSource)
    assert list(source.counts) == [4] * len(source.classes)
    assert source.sample_shape == (3, 32, 32)
    expected = np.repeat([FINE.index(label) for label in source.classes], 4)
    assert np.array_equal(source.samples[:, 0, 7, 7], expected)
    assert not source.samples[:, 1:].any()


def test_rows_and_columns_are_in_their_places(tmp_path: Path) -> None:
    part = pictures(1)
    part["data"][:] = (np.arange(3072) % 251).astype(np.uint8)
    write(tmp_path, train=part, test=part)
    sample = CIFARFS(tmp_path).load("val").samples[0].numpy()
    assert sample[2, 5, 9] == (2 * 1024 + 5 * 32 + 9) % 251


def test_the_archive_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    first = CIFARFS(tmp_path).load("test")
    monkeypatch.delattr(tarfile, "open")
    assert (CIFARFS(tmp_path).load("test").samples == first.samples).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meta": {"fine_label_names": FINE[::-1]}}, "does not hold the 100 classes"),
        ({"meta": {}}, "does not hold CIFAR-100's pictures and labels"),
        ({"meta": None}, "does not hold CIFAR-100's pictures and labels"),
        ({"train": pictures(1) | {"fine_labels": [0]}}, "does not hold CIFAR-100's pictures"),
        ({"train": pictures(1) | {"fine_labels": [101] * 100}}, "does not hold the 100 classes"),
        ({"train": {"data": np.zeros((1, 5), np.uint8), "fine_labels": [0]}}, "does not hold"),
        ({"test": print}, r"cifar-100-python/test asks for \w+.print"),
    ],
)
def test_an_archive_of_something_else_is_named(
    tmp_path: Path, changes: Content, message: str
) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(DatasetError, match=message) as caught:
        CIFARFS(tmp_path).load("train")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_archive_cut_short_is_named(tmp_path: Path) -> None:
    path = write(tmp_path)
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:length])
        with pytest.raises(DatasetError, match=r"cifar-100-python.tar.gz"):
            CIFARFS(tmp_path).load("train")


def test_an_archive_without_a_part_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cifar100" / "cifar-100-python.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz"):
        pass
    with pytest.raises(DatasetError, match="is not CIFAR-100's archive"):
        CIFARFS(tmp_path).load("train")


def test_a_missing_archive_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"--download fetches it from https://www.cs.toronto"):
        CIFARFS(tmp_path).load("train")
