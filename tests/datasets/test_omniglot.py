from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from datasets import ClassSource, DatasetError, omniglot
from datasets.download import digest
from datasets.omniglot import (
    MD5,
    VALIDATION_ALPHABETS,
    Omniglot,
    OmniglotLake,
    drawings,
    lake,
    maml,
    vinyals,
)

BACKGROUND = "images_background"


def repack(root: Path, edit: dict[str, bytes | None]) -> Path:
    """Add members to the background archive, or leave out those whose content is None."""
    path = root / "omniglot" / f"{BACKGROUND}.zip"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (members | edit).items():
            if content is not None:
                archive.writestr(name, content)
    return path


def first_drawing(root: Path, name: str) -> Image.Image:
    with zipfile.ZipFile(root / "omniglot" / f"{name}.zip") as archive:
        member = next(member for member in sorted(archive.namelist()) if member.endswith(".png"))
        return Image.open(io.BytesIO(archive.read(member)))


def encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def test_a_split_has_four_rotations_of_each_of_its_characters(omniglot_root: Path) -> None:
    source = OmniglotLake(omniglot_root).load("train")
    assert source.sample_shape == (1, 28, 28)
    assert source.samples.dtype == torch.uint8
    assert list(source.counts) == [6] * 24
    assert source.classes[:2] == ["Aurek/character01/rot000", "Aurek/character02/rot000"]
    upright = source.samples[:36, 0]
    for turns in range(4):
        turned = source.samples[36 * turns : 36 * (turns + 1), 0]
        assert np.array_equal(turned, np.rot90(upright, turns, (1, 2)))
    assert source.classes[18] == "Aurek/character01/rot270"


def test_ink_is_255_on_0_in_the_place_where_it_was_drawn(omniglot_root: Path) -> None:
    drawing = np.asarray(first_drawing(omniglot_root, BACKGROUND).resize((28, 28)))
    image = OmniglotLake(omniglot_root).load("train").samples[0, 0].numpy()
    assert image.max() == 255
    assert image.min() == 0
    sure = (image < 40) | (image > 215)
    assert sure.mean() > 0.7
    assert np.array_equal(image[sure] > 127, ~drawing[sure])


def test_pixels_are_those_of_torchmetas_transform(omniglot_root: Path) -> None:
    inverted = first_drawing(omniglot_root, BACKGROUND).convert("L").point(lambda v: 255 - v)
    expected = np.asarray(inverted.resize((28, 28), Image.Resampling.BILINEAR))
    assert np.array_equal(OmniglotLake(omniglot_root).load("train").samples[0, 0], expected)


def test_the_second_load_reads_nothing_from_the_archives_but_their_names(
    omniglot_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = OmniglotLake(omniglot_root).load("test")
    monkeypatch.delattr(zipfile.ZipFile, "read")
    assert torch.equal(OmniglotLake(omniglot_root).load("test").samples, first.samples)


def test_another_archive_is_not_served_from_the_cache(omniglot_root: Path) -> None:
    member = f"{BACKGROUND}/Aurek/character01/0001_01.png"
    before = OmniglotLake(omniglot_root).load("train").samples[0]
    repack(omniglot_root, {member: encoded(np.ones((105, 105), dtype=bool))})
    assert before.any()
    assert not OmniglotLake(omniglot_root).load("train").samples[0].any()


def test_what_an_operating_system_leaves_in_an_archive_is_passed_over(omniglot_root: Path) -> None:
    path = repack(
        omniglot_root,
        {
            f"__MACOSX/{BACKGROUND}/Aurek/character01/._0001_01.png": b"",
            f"{BACKGROUND}/Aurek/character01/._0001_01.png": b"",
            f"{BACKGROUND}/.DS_Store": b"",
        },
    )
    assert list(drawings(path)) == [
        f"{alphabet}/character{number:02}"
        for alphabet in ("Aurek", "Besh_(old)")
        for number in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({f"{BACKGROUND}/Aurek/0001_01.png": b""}, "Alphabet/characterNN/NNNN_NN.png"),
        ({"../character01/0001_01.png": b""}, "Alphabet/characterNN/NNNN_NN.png"),
        ({f"{BACKGROUND}/Aurek/character01/0001_01.png": b"not a picture"}, "0001_01.png cannot"),
        ({f"{BACKGROUND}/Aurek/character01/0001_01.png": bytes(2 << 20)}, "too large"),
        (
            {f"{BACKGROUND}/Aurek/character01/0001_01.png": encoded(np.ones((9, 9), dtype=bool))},
            "9x9",
        ),
    ],
)
def test_what_does_not_belong_in_an_archive_is_named(
    omniglot_root: Path, edit: dict[str, bytes | None], message: str
) -> None:
    path = repack(omniglot_root, edit)
    with pytest.raises(DatasetError, match=message) as caught:
        OmniglotLake(omniglot_root).load("train")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_picture_with_a_damaged_body_is_named(omniglot_root: Path) -> None:
    member = f"{BACKGROUND}/Aurek/character01/0001_01.png"
    whole = encoded(np.eye(105, dtype=bool))
    repack(omniglot_root, {member: whole[: len(whole) // 2]})
    with pytest.raises(DatasetError, match=r"0001_01.png cannot be read as a picture"):
        OmniglotLake(omniglot_root).load("train")


def test_an_archive_cut_short_is_named(omniglot_root: Path) -> None:
    path = omniglot_root / "omniglot" / f"{BACKGROUND}.zip"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DatasetError, match=r"images_background.zip is not a whole zip archive"):
        OmniglotLake(omniglot_root).load("train")


def test_an_archive_with_damaged_content_is_named(omniglot_root: Path) -> None:
    path = omniglot_root / "omniglot" / f"{BACKGROUND}.zip"
    content = bytearray(path.read_bytes())
    content[300:330] = bytes(30)
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"images_background.zip"):
        OmniglotLake(omniglot_root).load("train")


def test_an_archive_of_something_else_is_named(omniglot_root: Path) -> None:
    path = omniglot_root / "omniglot" / f"{BACKGROUND}.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no drawings here")
    with pytest.raises(DatasetError, match="holds no drawings"):
        OmniglotLake(omniglot_root).load("train")


def test_a_missing_archive_says_where_it_was_looked_for_and_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="--download") as caught:
        Omniglot(tmp_path).load("train")
    assert str(tmp_path / "omniglot" / f"{BACKGROUND}.zip") in str(caught.value)


def test_a_split_over_the_whole_set_is_refused_for_a_part_of_it(omniglot_root: Path) -> None:
    with pytest.raises(DatasetError, match="12 characters; this split is defined over all 1623"):
        Omniglot(omniglot_root).load("train")


def test_lakes_split_has_no_validation_classes(omniglot_root: Path) -> None:
    with pytest.raises(DatasetError, match="omniglot_lake has no 'val' split; it has train, test"):
        datasets.loader("omniglot_lake", split="val", root=omniglot_root)


@pytest.fixture(scope="module")
def characters(real_root: Path) -> tuple[list[str], list[str]]:
    folder = real_root / "omniglot"
    background, evaluation = (list(drawings(folder / f"{name}.zip")) for name in MD5)
    return background, evaluation


def alphabets(names: list[str]) -> set[str]:
    return {name.split("/")[0] for name in names}


def test_the_real_archives_have_964_and_659_characters(
    characters: tuple[list[str], list[str]],
) -> None:
    background, evaluation = characters
    assert (len(background), len(evaluation)) == (964, 659)
    assert (len(alphabets(background)), len(alphabets(evaluation))) == (30, 20)
    assert not alphabets(background) & alphabets(evaluation)


def test_vinyals_split_is_the_published_one(characters: tuple[list[str], list[str]]) -> None:
    split = vinyals(*characters)
    assert {name: len(part) for name, part in split.items()} == {
        "train": 1028,
        "val": 172,
        "test": 423,
    }
    assert split["test"][0] == "Gurmukhi/character42"
    assert alphabets(list(split["val"])) == VALIDATION_ALPHABETS
    assert not alphabets(list(split["train"])) & VALIDATION_ALPHABETS


@pytest.mark.parametrize(
    ("divide", "sizes"),
    [(vinyals, [1028, 172, 423]), (maml, [1100, 100, 423]), (lake, [964, 659])],
)
def test_splits_share_no_character_and_leave_none_out(
    characters: tuple[list[str], list[str]], divide: type, sizes: list[int]
) -> None:
    parts = list(divide(*characters).values())
    assert [len(part) for part in parts] == sizes
    together = [character for part in parts for character in part]
    assert len(together) == len(set(together)) == 1623


def test_the_random_split_stays_what_it_is(characters: tuple[list[str], list[str]]) -> None:
    split = maml(*characters)
    assert split["train"][:2] == ["Keble/character17", "Grantha/character24"]
    assert split["val"][:2] == ["Japanese_(katakana)/character14", "Kannada/character05"]
    assert split["test"][:2] == ["Japanese_(hiragana)/character21", "Latin/character21"]


@pytest.fixture(scope="module")
def real(real_root: Path) -> ClassSource:
    return Omniglot(real_root).load("test")


def test_every_real_class_has_twenty_drawings(real: ClassSource) -> None:
    assert list(real.counts) == [20] * 423 * 4
    assert real.classes[0] == "Gurmukhi/character42/rot000"


def test_every_real_drawing_has_ink_on_an_empty_ground(real: ClassSource) -> None:
    ink = real.samples.float().flatten(1) / 255
    assert (ink.amax(1) > 0.5).all()
    assert 0.03 < ink.mean() < 0.15


def test_real_rotations_are_those_of_the_upright_drawing(real: ClassSource) -> None:
    turned = real.samples.view(4, 423 * 20, 28, 28)
    for turns in range(4):
        assert torch.equal(turned[turns], turned[0].rot90(turns, (1, 2)))


def test_real_splits_of_one_dataset_share_no_picture(real: ClassSource, real_root: Path) -> None:
    def pictures(source: ClassSource) -> set[bytes]:
        upright = source.samples[: len(source.samples) // 4]
        return {image.tobytes() for image in upright.numpy()}

    train, val = (pictures(Omniglot(real_root).load(split)) for split in ("train", "val"))
    assert len(train) > 20_000
    # A handful of drawings, dots and straight strokes, coincide between alphabets.
    assert len((train | val) & pictures(real)) < 20
    assert len(train & val) < 20


def test_a_repacked_copy_of_the_real_archives_is_not_asked_for_its_checksum(
    real_root: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "omniglot"
    shutil.copytree(real_root / "omniglot", folder)
    with zipfile.ZipFile(folder / f"{BACKGROUND}.zip", "a") as archive:
        archive.writestr(f"{BACKGROUND}/note.txt", "packed again")
    assert digest(folder / f"{BACKGROUND}.zip", "md5") != MD5[BACKGROUND]
    assert len(drawings(folder / f"{BACKGROUND}.zip")) == 964


# Archives that are not meant well


def packed(root: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    path = root / "omniglot" / f"{BACKGROUND}.zip"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


DRAWING = f"{BACKGROUND}/Aurek/character01/0001_01.png"


@pytest.mark.parametrize(
    "name",
    [
        f"{BACKGROUND}/../character01/0001_01.png",
        f"../{DRAWING}",
        f"/{DRAWING}",
        f"{BACKGROUND}/..\\..\\Aurek/character01/0001_01.png",
        f"{BACKGROUND}/Au\nrek/character01/0001_01.png",
    ],
)
def test_names_that_leave_the_folder_are_refused(omniglot_root: Path, name: str) -> None:
    packed(omniglot_root, {name: b"x"})
    with pytest.raises(DatasetError, match="its drawings must be"):
        OmniglotLake(omniglot_root).load("train")


@pytest.mark.parametrize("compression", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_compression_that_unpacks_more_than_is_asked_for_is_refused(
    omniglot_root: Path, compression: int
) -> None:
    packed(omniglot_root, {DRAWING: bytes(1 << 19)}, compression)
    with pytest.raises(DatasetError, match="is neither stored nor deflated"):
        OmniglotLake(omniglot_root).load("train")


def test_bombs_are_refused_before_they_are_unpacked(
    omniglot_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed(omniglot_root, {DRAWING: bytes(1 << 21)})
    with pytest.raises(DatasetError, match="too large to be a drawing"):
        OmniglotLake(omniglot_root).load("train")
    names = [DRAWING.replace("_01", f"_{number:02}") for number in range(1, 9)]
    packed(omniglot_root, dict.fromkeys(names, bytes(1 << 19)))
    monkeypatch.setattr(omniglot, "MOST_BYTES_IN_ALL", 1 << 21)
    with pytest.raises(DatasetError, match="unpacks to more than 2 MiB"):
        OmniglotLake(omniglot_root).load("train")
    monkeypatch.setattr(omniglot, "MOST_MEMBERS", 7)
    with pytest.raises(DatasetError, match="more than 7 members"):
        OmniglotLake(omniglot_root).load("train")


def test_a_member_that_says_less_than_it_unpacks_to_is_cut_there(omniglot_root: Path) -> None:
    path = packed(omniglot_root, {DRAWING: bytes(1 << 20)})
    content = path.read_bytes()
    assert content.count((1 << 20).to_bytes(4, "little")) == 2
    path.write_bytes(content.replace((1 << 20).to_bytes(4, "little"), (99).to_bytes(4, "little")))
    with pytest.raises(DatasetError, match="is corrupt"):
        OmniglotLake(omniglot_root).load("train")


def test_a_drawing_of_absurd_size_is_refused_before_it_is_decoded(omniglot_root: Path) -> None:
    picture = io.BytesIO()
    Image.new("1", (9000, 9000)).save(picture, "png")
    packed(omniglot_root, {DRAWING: picture.getvalue()})
    with pytest.raises(DatasetError, match="it is 9000x9000, not 105x105"):
        OmniglotLake(omniglot_root).load("train")
