from __future__ import annotations

import sys
from pathlib import Path

import pytest

import datasets
from datasets import Dataset, DatasetError, base
from datasets.sinusoid import Sinusoid, SinusoidSource

PLUGIN = '''
from datasets import Dataset
from datasets.sinusoid import SinusoidSource

class Waves(Dataset):
    """Somebody else's."""

    summary = "somebody else's waves"

    def load(self, split):
        return SinusoidSource()
'''


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it; what the package's own files do is not."""
    datasets.names()
    monkeypatch.setattr(base, "_registry", dict(base._registry))


class Toy(Dataset):
    summary = "a toy"

    def load(self, split: str) -> SinusoidSource:
        return SinusoidSource()


def test_every_file_of_the_package_is_found() -> None:
    assert {
        "cifar_fs",
        "fc100",
        "image_folder",
        "mini_imagenet",
        "omniglot",
        "omniglot_lake",
        "omniglot_maml",
        "sinusoid",
    } <= set(datasets.names())
    for name in datasets.names():
        dataset = datasets.get(name)
        assert dataset.name == name
        assert "\n" not in dataset.summary
        assert set(dataset.splits) <= {"train", "val", "test", "runs"}


def test_a_registered_class_is_got_by_name_and_keeps_it() -> None:
    assert datasets.register("toy")(Toy) is Toy
    assert datasets.get("toy") is Toy
    assert Toy.name == "toy"
    assert "toy" in datasets.names()
    assert datasets.loader("toy")[0]["train"][0].shape == (1, 1, 1)


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(DatasetError, match="'sinusiod'; did you mean 'sinusoid'"):
        datasets.get("sinusiod")


def test_a_name_like_no_other_lists_them_all() -> None:
    with pytest.raises(DatasetError, match=r"there are .*omniglot.*") as caught:
        datasets.get("zzz")
    assert "sinusoid" in str(caught.value)


def test_a_name_is_given_once() -> None:
    with pytest.raises(DatasetError, match="two datasets are called 'sinusoid'"):
        datasets.register("sinusoid")(Toy)
    assert datasets.get("sinusoid") is Sinusoid


def test_a_class_may_be_registered_again_as_when_its_file_is_read_twice() -> None:
    assert datasets.register("toy")(datasets.register("toy")(Toy)) is Toy


def install(folder: Path) -> None:
    """What pip leaves of a package that says it has a dataset."""
    info = folder / "somebodys_waves-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys-waves\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[bench.datasets]\nwaves = somebodys_waves:Waves\n")


def test_an_installed_package_adds_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "somebodys_waves.py").write_text(PLUGIN)
    install(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert datasets.get("waves").summary == "somebody else's waves"
    assert datasets.get("waves").__module__ == "somebodys_waves"
    assert datasets.loader("waves", shots=2)[0]["train"][0].shape == (1, 2, 1)
    del sys.modules["somebodys_waves"]


def test_a_broken_package_is_named_and_takes_nothing_else_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert datasets.get("sinusoid") is Sinusoid
    said = "somebodys_waves:Waves, offered as dataset 'waves', cannot be loaded: No module"
    with pytest.warns(UserWarning, match=said):
        assert "sinusoid" in datasets.names()
    with pytest.warns(UserWarning, match=said), pytest.raises(DatasetError, match="'waves'"):
        datasets.get("waves")


def test_a_home_folder_is_meant_by_its_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_DATA", "~/data")
    assert Toy().root == Toy("~/data").root == Path.home() / "data"


def test_data_is_looked_for_in_the_root_then_the_environment_then_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BENCH_DATA", str(tmp_path / "environment"))
    assert Toy(tmp_path / "given").root == tmp_path / "given"
    assert Toy().root == tmp_path / "environment"
    monkeypatch.delenv("BENCH_DATA")
    assert Toy().root == base.cache_folder()
    assert base.cache_folder().name == base.APPLICATION
