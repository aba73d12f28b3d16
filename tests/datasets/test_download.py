from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from datasets import DatasetError
from datasets.download import digest, fetch, locate

CONTENT = bytes(range(256)) * 5000
MD5 = hashlib.md5(CONTENT).hexdigest()

Serve = Callable[[str, bytes], str]


def test_a_file_is_fetched_into_a_new_folder_and_nothing_else_is_left(
    serve: Serve, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "deep" / "data.zip"
    assert locate(path, url=serve("data.zip", CONTENT), md5=MD5, download=True) == path
    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == ["data.zip"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_wrong_checksum_leaves_nothing_behind(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "new" / "data.zip"
    with pytest.raises(DatasetError, match=f"not {MD5}"):
        fetch(serve("data.zip", CONTENT[:-1]), path, MD5)
    assert list(path.parent.iterdir()) == []


def test_a_missing_address_is_one_line_with_the_address(serve: Serve, tmp_path: Path) -> None:
    url = serve("other.zip", b"") + ".gone"
    with pytest.raises(DatasetError, match="404") as caught:
        fetch(url, tmp_path / "data.zip", MD5)
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_network_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="could not be fetched"):
        fetch("http://127.0.0.1:9/data.zip", tmp_path / "data.zip", MD5)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DatasetError, match="could not be fetched"):
        fetch(serve("data.zip", CONTENT), tmp_path / "file" / "data.zip", MD5)


def test_a_file_on_disk_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "data.zip"
    path.write_bytes(b"packed again")
    assert locate(path, url="http://127.0.0.1:9/", md5=MD5, download=True) == path
    assert path.read_bytes() == b"packed again"


def test_a_missing_file_says_how_to_get_it(tmp_path: Path) -> None:
    path = tmp_path / "data.zip"
    with pytest.raises(DatasetError, match="--download") as caught:
        locate(path, url="http://127.0.0.1:9/x", md5=MD5, download=False)
    assert str(path) in str(caught.value)
    assert "http://127.0.0.1:9/x" in str(caught.value)


def test_digest_is_hashlibs(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(CONTENT)
    assert digest(path, "sha256") == hashlib.sha256(CONTENT).hexdigest()


def test_a_download_without_end_is_dropped(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.download.MOST_BYTES", 1 << 20)
    path = tmp_path / "new" / "data.zip"
    with pytest.raises(DatasetError, match="sends more than 1 MiB"):
        fetch(serve("data.zip", CONTENT), path, MD5)
    assert list(path.parent.iterdir()) == []
