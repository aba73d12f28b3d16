from __future__ import annotations

import os
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.ndimage import gaussian_filter

import datasets
from datasets import glyphs
from datasets.base import cache_folder
from datasets.cache import cached
from datasets.episodes import ClassSource
from datasets.glyph_rendering import FACES, SIDE, Face, font_path
from datasets.glyphs import SAMPLES, Glyphs

FEW = {"train": [ord("A"), ord("B")], "val": [0x561], "test": [0x2D63]}
ALL_FACES = [Face(stem) for stem in FACES]

Splits = Mapping[str, ClassSource]


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Splits]:
    """Every split, rendered into an empty cache that stays for the tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield {split: Glyphs().load(split) for split in Glyphs.splits}


def by_class(source: ClassSource) -> torch.Tensor:
    """Ink in [0, 1], float32 ``(classes, SAMPLES, SIDE * SIDE)``."""
    return source.samples.view(-1, SAMPLES, SIDE * SIDE).float() / 255


def directions(images: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(images, dim=-1)


def test_a_thousand_classes_of_twenty_samples(splits: Splits) -> None:
    assert sum(len(source.classes) for source in splits.values()) >= 1000
    assert len(splits["val"].classes) >= 75
    assert len(splits["test"].classes) >= 115
    for source in splits.values():
        assert source.samples.dtype == torch.uint8
        assert source.samples.shape == (20 * len(source.classes), 1, 28, 28)
        assert set(source.counts) == {20}


def test_splits_have_no_script_or_class_in_common(splits: Splits) -> None:
    scripts = [{name.split()[0] for name in source.classes} for source in splits.values()]
    assert all(scripts)
    assert len(set.union(*scripts)) == sum(len(words) for words in scripts)
    names = [name for source in splits.values() for name in source.classes]
    assert len(set(names)) == len(names)


def test_training_is_not_mostly_one_script(splits: Splits) -> None:
    names = splits["train"].classes
    for script in {name.split()[0] for name in names}:
        assert sum(name.startswith(script) for name in names) < 0.4 * len(names)


def test_look_alikes_are_merged_into_the_training_class(splits: Splits) -> None:
    classes = {split: set(source.classes) for split, source in splits.items()}
    everything = set.union(*classes.values())
    assert {"LATIN CAPITAL LETTER A", "LATIN CAPITAL LETTER S"} <= classes["train"]
    assert "GREEK CAPITAL LETTER ALPHA" not in everything
    assert "CYRILLIC CAPITAL LETTER A" not in everything
    assert "LATIN SMALL LETTER S" not in everything
    assert "ARMENIAN CAPITAL LETTER OH" not in everything
    assert "TIFINAGH LETTER YAW" not in everything
    # What a reader tells apart stays apart.
    assert {"LATIN CAPITAL LETTER D", "LATIN CAPITAL LETTER O"} <= classes["train"]
    assert {"ARABIC LETTER BEH", "ARABIC LETTER TEH"} <= classes["train"]


def test_no_held_out_class_looks_like_a_training_class(splits: Splits) -> None:
    def undistorted(names: Sequence[str]) -> torch.Tensor:
        """Blurred silhouettes in DejaVu Sans, which has nearly every character."""
        drawn = (sans.silhouette(ord(unicodedata.lookup(name))) for name in names)
        blurred = [gaussian_filter(ink.astype(float), 2) for ink in drawn if ink is not None]
        assert len(blurred) >= 0.9 * len(names)
        return directions(torch.from_numpy(np.stack(blurred)).flatten(1))

    sans = Face("DejaVuSans")
    near_identical = 0.98
    train = undistorted(splits["train"].classes)
    twins = undistorted(["ARMENIAN CAPITAL LETTER OH", "CYRILLIC SMALL LETTER DZE"])
    assert (twins @ train.T).amax(dim=1).min() > near_identical
    val, test = (undistorted(splits[split].classes) for split in ("val", "test"))
    for held_out, met in ((val, train), (test, train), (test, val)):
        assert (held_out @ met.T).max() < near_identical


def test_every_sample_has_ink_and_none_at_the_border(splits: Splits) -> None:
    for source in splits.values():
        images = source.samples[:, 0]
        assert images.flatten(1).amax(dim=1).min() > 100
        assert (images > 100).flatten(1).sum(dim=1).min() >= 4
        assert (images > 100).flatten(1).sum(dim=1).max() < SIDE * SIDE / 2
        for border in (images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]):
            assert not border.any()


def test_samples_of_a_class_are_alike_but_no_clones(splits: Splits) -> None:
    for source in splits.values():
        shapes = directions(by_class(source))
        likeness = shapes @ shapes.transpose(1, 2)
        others = likeness[:, ~torch.eye(SAMPLES, dtype=torch.bool)]
        assert others.max() < 0.995
        assert others.mean() < 0.8
        strangers = shapes[:-1] @ shapes[1:].transpose(1, 2)
        assert others.mean() > strangers.mean() + 0.1


def test_one_shot_by_pixels_is_neither_hopeless_nor_solved(splits: Splits) -> None:
    loader = datasets.loader("glyphs", ways=5, shots=1, split="test", batch_size=200)
    (support, support_labels), (query, query_labels) = (
        loader[0][half] for half in ("train", "test")
    )
    nearest = torch.cdist(query.flatten(2), support.flatten(2)).argmin(dim=2)
    accuracy = (support_labels.gather(1, nearest) == query_labels).float().mean()
    assert 0.4 < accuracy < 0.75


def test_the_same_seed_gives_the_same_bits(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    first = glyphs.specimens(ord("A"), ALL_FACES)
    again = glyphs.specimens(ord("A"), ALL_FACES)
    assert np.array_equal(first, again)
    # Whichever characters are rendered with it.
    start = list(splits["train"].classes).index("LATIN CAPITAL LETTER A") * SAMPLES
    assert np.array_equal(first, splits["train"].samples[start : start + SAMPLES, 0].numpy())
    monkeypatch.setattr(glyphs, "SEED", 1)
    assert not np.array_equal(first, glyphs.specimens(ord("A"), ALL_FACES))


def test_a_face_has_only_what_it_draws_truly() -> None:
    sans, roman = Face("DejaVuSans"), Face("cmr10")
    assert sans.silhouette(ord("A")) is not None
    assert roman.silhouette(ord("A")) is not None
    assert sans.silhouette(ord(" ")) is None
    assert sans.silhouette(ord(".")) is None
    # Computer Modern has another glyph where Unicode has the accented capital.
    assert roman.silhouette(0xC0) is None
    unassigned = 0x10FFFE
    assert sans.silhouette(unassigned) is None
    sans.code_points |= {unassigned}
    assert sans.silhouette(unassigned) is None, "the box for missing characters was taken for one"


def test_a_font_that_is_not_there_is_named_in_one_line() -> None:
    with pytest.raises(datasets.DatasetError, match=r"no .*Nonesuch\.ttf$"):
        font_path("Nonesuch")


def test_the_cache_is_read_in_well_under_a_second(splits: Splits) -> None:
    (file,) = (cache_folder() / "derived").iterdir()
    written = file.stat().st_mtime_ns
    start = time.perf_counter()
    again = Glyphs().load("train")
    assert time.perf_counter() - start < 1
    assert torch.equal(again.samples, splits["train"].samples)
    assert file.stat().st_mtime_ns == written


def test_a_truncated_cache_file_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = cached("few", "1", lambda: glyphs.render(FEW))
    (file,) = (cache_folder() / "derived").iterdir()
    whole = file.read_bytes()
    for kept in (len(whole) // 2, 4, 0):
        file.write_bytes(whole[:kept])
        again = cached("few", "1", lambda: glyphs.render(FEW))
        assert all(torch.equal(again[key], first[key]) for key in first)
        assert file.read_bytes() == whole


BUILD_TOGETHER = """
import sys, time
from pathlib import Path
from safetensors.torch import save
from datasets import glyphs
from datasets.cache import cached

folder, mine, other = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def build():
    (folder / mine).touch()
    deadline = time.monotonic() + 60
    while not (folder / other).exists():
        assert time.monotonic() < deadline, "the other process never began"
        time.sleep(0.01)
    return glyphs.render({few})

tensors = cached("few", "1", build)
(folder / f"{{mine}}.out").write_bytes(save(tensors))
"""


def test_two_processes_that_build_at_once_both_get_it_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    script = BUILD_TOGETHER.format(few=FEW)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), *names],
            cwd=Path(datasets.__file__).parents[1],
            env=dict(os.environ),
        )
        for names in (("a", "b"), ("b", "a"))
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    expected = glyphs.render(FEW)
    (file,) = (cache_folder() / "derived").iterdir()
    for path in (tmp_path / "a.out", tmp_path / "b.out", file):
        tensors = load_file(path)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], expected[key]) for key in expected)
