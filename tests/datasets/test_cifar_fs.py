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


def write(root: Path, folder: str = "cifar-100-python", **changes: Any) -> Path:
    content = {"meta": {"fine_label_names": FINE}, "train": pictures(3), "test": pictures(1)}
    path = root / "cifar100" / "cifar-100-python.tar.gz"
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, value in (content | changes).items():
            data = pickle.dumps(value, 2)
            member = tarfile.TarInfo(f"{folder}/{name}")
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


def test_an_archive_packed_again_from_within_a_folder_is_read(tmp_path: Path) -> None:
    write(tmp_path, folder="./cifar-100-python")
    assert len(CIFARFS(tmp_path).load("val").classes) == 16


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
    with pytest.raises(
        DatasetError,
        match=r"--download \(in Python download=True\) fetches it from https://www.cs.toronto",
    ):
        CIFARFS(tmp_path).load("train")


# Archives that are not meant well


def evil(root: Path, members: list[tarfile.TarInfo], content: bytes = b"") -> Path:
    """An archive with these members before those of CIFAR-100."""
    path = root / "cifar100" / "cifar-100-python.tar.gz"
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for member in members:
            member.size = len(content) if member.isreg() else 0
            archive.addfile(member, io.BytesIO(content) if member.isreg() else None)
        for name, value in {"meta": {"fine_label_names": FINE}, "train": pictures(1)}.items():
            data = pickle.dumps(value, 2)
            member = tarfile.TarInfo(f"cifar-100-python/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, to: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, to
    return made


@pytest.mark.parametrize(
    ("kind", "to"),
    [
        (tarfile.SYMTYPE, "/etc/passwd"),
        (tarfile.SYMTYPE, "test"),  # of itself, without end
        (tarfile.LNKTYPE, "cifar-100-python/test"),
        (tarfile.CHRTYPE, ""),
        (tarfile.FIFOTYPE, ""),
        (tarfile.DIRTYPE, ""),
    ],
)
def test_what_is_no_file_is_not_read(tmp_path: Path, kind: bytes, to: str) -> None:
    evil(tmp_path, [member("cifar-100-python/test", kind, to)])
    with pytest.raises(DatasetError, match="is not a file, but a link or the like"):
        CIFARFS(tmp_path).load("train")


def test_names_that_leave_the_folder_lead_nowhere(tmp_path: Path) -> None:
    names = ("../../evil", "/tmp/evil-of-bench", "cifar-100-python/../../../evil")
    evil(tmp_path, [member(name) for name in names], b"evil")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DatasetError, match="it has no cifar-100-python/test"):
        CIFARFS(tmp_path).load("train")
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/evil-of-bench").exists()


def test_an_archive_that_unpacks_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.cifar_fs.MOST_BYTES", 1 << 22)
    path = evil(tmp_path, [member("zeros")], bytes(1 << 23))
    assert path.stat().st_size < 1 << 21
    with pytest.raises(DatasetError, match="unpacks to more than 4 MiB"):
        CIFARFS(tmp_path).load("train")


def test_an_archive_of_a_million_members_is_refused(tmp_path: Path) -> None:
    evil(tmp_path, [member(f"{number}") for number in range(1001)])
    with pytest.raises(DatasetError, match="more than 1,000 members"):
        CIFARFS(tmp_path).load("train")


def test_a_sparse_file_of_a_terabyte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cifar100" / "cifar-100-python.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as archive:
        sparse = member("cifar-100-python/meta")
        sparse.pax_headers = {
            **{"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,1"},
            **{"GNU.sparse.size": str(1 << 40), "GNU.sparse.name": "cifar-100-python/meta"},
        }
        archive.addfile(sparse)
    with pytest.raises(DatasetError, match="is not a file"):
        CIFARFS(tmp_path).load("train")


@pytest.mark.parametrize("labels", [[10**12] * 100, [2**70] * 100, [-1] * 100, [[1]] * 100])
def test_labels_that_cannot_be_set_no_memory_aside(tmp_path: Path, labels: list[Any]) -> None:
    write(tmp_path, train=pictures(1) | {"fine_labels": labels})
    with pytest.raises(DatasetError, match="does not hold"):
        CIFARFS(tmp_path).load("train")
