"""Omniglot's one-shot challenge: the runs that its authors fixed, and no others."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import datasets
from datasets import DatasetError, EpisodeSpec
from datasets.omniglot import OmniglotLake
from datasets.omniglot_runs import members
from tests.datasets.conftest import png

SPEC = EpisodeSpec("omniglot_lake", "runs", 20, 1, 1, 0)


def write_runs(root: Path, edit: dict[str, bytes | None] | None = None) -> Path:
    """An archive in which run r's class c is a bar c + 1 pixels wide, drawn twice, and item i of
    run r is of class (i + r) mod 20; members may be changed, or left out where they are None."""
    contents: dict[str, bytes | None] = {}
    for name in members():
        run, _, rest = name.partition("/")
        number = int(run[3:])
        if rest == "class_labels.txt":
            contents[name] = "".join(
                f"{run}/test/item{item:02}.png {run}/training/class{answer + 1:02}.png\n"
                for item in range(1, 21)
                for answer in [_class(number, item)]
            ).encode()
            continue
        index = int(rest[-6:-4])
        drawn = index - 1 if rest.startswith("training") else _class(number, index)
        pixels = np.ones((105, 105), dtype=bool)
        pixels[:, : 4 * (drawn + 1)] = False
        contents[name] = png(pixels)
    path = root / "omniglot" / "all_runs.zip"
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (contents | (edit or {})).items():
            if content is not None:
                archive.writestr(name, content)
    return path


def _class(run: int, item: int) -> int:
    return (item + run) % 20


def test_an_episode_is_a_run_with_its_answers(tmp_path: Path) -> None:
    write_runs(tmp_path)
    loader = datasets.loader(
        "omniglot_lake", ways=20, shots=1, test_shots=1, split="runs", batch_size=6, root=tmp_path
    )
    batches = list(loader)
    assert [len(batch["train"][1]) for batch in batches] == [6, 6, 6, 2]
    (support, classes), (query, labels) = batches[1]["train"], batches[1]["test"]
    assert support.shape == query.shape == (6, 20, 1, 28, 28)
    assert (support.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert classes.tolist() == [list(range(20))] * 6
    for position, run in enumerate(range(7, 13)):
        assert labels[position].tolist() == [_class(run, item) for item in range(1, 21)]
        # Ink is 1, and each item looks like the class that it is of.
        assert torch.equal(query[position], support[position][labels[position]])
    assert support[0, :, 0, 14].sum(1).diff().min() > 0.9


def test_the_runs_are_the_same_whatever_the_seed(tmp_path: Path) -> None:
    write_runs(tmp_path)
    source = OmniglotLake(tmp_path).load("runs")
    other = EpisodeSpec("omniglot_lake", "runs", 20, 1, 1, 7)
    first, second = source.batch(SPEC, [3]), source.batch(other, [3])
    assert torch.equal(first["test"][0], second["test"][0])
    assert source.episodes(SPEC) == 20


@pytest.mark.parametrize("shape", [(5, 1, 1), (20, 5, 1), (20, 1, 5)])
def test_another_shape_is_refused(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    write_runs(tmp_path)
    with pytest.raises(DatasetError, match="are 20-way 1-shot with 1 test shot, not"):
        OmniglotLake(tmp_path).load("runs").check(EpisodeSpec("omniglot_lake", "runs", *shape, 0))


LABELS = "run03/class_labels.txt"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"run03/test/item05.png": None}, "holds no 'run03/test/item05.png'"),
        ({"run03/test/item05.png": b"no picture"}, "item05.png cannot be read as a picture"),
        ({"run03/test/item05.png": bytes(2 << 20)}, "item05.png is too large to be a drawing"),
        ({LABELS: b""}, "class_labels.txt does not pair 20 items with drawings of the run"),
        ({LABELS: b"\xff\xfe \x00\n" * 20}, "does not pair 20 items"),
        ({LABELS: b"end \n"}, "does not pair 20 items"),
        ({LABELS: b"a\tb c\n"}, "does not pair 20 items"),
    ],
)
def test_a_broken_archive_is_named_in_one_line(
    tmp_path: Path, edit: dict[str, bytes | None], message: str
) -> None:
    path = write_runs(tmp_path, edit)
    with pytest.raises(DatasetError, match=message) as caught:
        OmniglotLake(tmp_path).load("runs")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_archive_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError,
        match=r"all_runs.zip is missing; --download \(in Python download=True\) fetches it",
    ):
        OmniglotLake(tmp_path).load("runs")


def test_the_real_runs_are_drawings_of_evaluation_characters_alone(real_root: Path) -> None:
    if not (real_root / "omniglot" / "all_runs.zip").is_file():
        pytest.skip("$BENCH_DATA has no omniglot/all_runs.zip")
    dataset = OmniglotLake(real_root)
    runs = dataset.load("runs")
    # Every item of a run is of a class of its own.
    assert torch.equal(runs.labels.sort(dim=1).values, torch.arange(20).expand(20, 20))
    known = {}
    for split in ("train", "test"):
        source = dataset.load(split)
        upright = len(source.counts) // 4
        names = np.repeat(source.classes[:upright], source.counts[:upright])
        images = source.samples[: len(names), 0].numpy()
        known[split] = {i.tobytes(): name for i, name in zip(images, names, strict=True)}
    for run in range(20):
        drawn = [
            [known["test"][i.numpy().tobytes()] for i in part[run, :, 0]]
            for part in (runs.support, runs.query)
        ]
        assert [drawn[0][label] for label in runs.labels[run]] == drawn[1]
        assert len({name.split("/")[0] for name in drawn[0]}) == 1
        assert not {i.numpy().tobytes() for i in runs.query[run, :, 0]} & known["train"].keys()
