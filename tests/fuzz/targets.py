"""The readers that a fuzzer tries: each takes any bytes, and either reads them or says in one line
what is wrong with them. Anything else is a fault."""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from algorithms import AlgorithmError
from bench.errors import BenchError, DamagedError, printable
from datasets import DatasetError, cifar_fs, mini_imagenet, omniglot, pickles
from datasets.images import bombs_refused, colour

REFUSALS = (AlgorithmError, BenchError, DatasetError)
"""What a reader may raise: one line that names what is wrong."""


@dataclass(frozen=True)
class Target:
    """A reader under test.

    Attributes:
        reads: what it is, for people.
        run: read these bytes, with a folder of its own to put them in.
        seeds: sound inputs to start from.
    """

    reads: str
    run: Callable[[bytes, Path], None]
    seeds: Callable[[], list[bytes]]


def tried(target: Target, data: bytes, folder: Path) -> bool:
    """Whether the target read these bytes; what it raises besides refusals is a fault."""
    try:
        target.run(data, folder)
    except REFUSALS:
        return False
    return True


def _pickle(data: bytes, folder: Path) -> None:
    pickles.read(io.BytesIO(data), "data.pkl")


def _pickles() -> list[bytes]:
    content = {
        "image_data": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
        "class_dict": {"n01": [0, 1], "n02": (np.int64(3), 2.5, None, True, b"x", "é")},
        "more": [np.asfortranarray(np.ones((2, 2), ">f4")), {1, 2}, frozenset("a")],
    }
    plain = {name: value for name, value in content.items() if name != "more"}
    return [pickle.dumps(content, protocol) for protocol in range(6)] + [pickle.dumps(plain, 2)]


def _zip(data: bytes, folder: Path) -> None:
    path = folder / "images_background.zip"
    path.write_bytes(data)
    omniglot.pictures(path, omniglot.drawings(path))


def _zips() -> list[bytes]:
    picture = io.BytesIO()
    Image.new("1", omniglot.DRAWN, 1).save(picture, "png")
    found = []
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", compression) as archive:
            archive.writestr("images_background/", "")
            for name in ("0001_01", "0001_02"):
                member = f"images_background/Aurek/character01/{name}.png"
                archive.writestr(member, picture.getvalue())
        found.append(file.getvalue())
    return found


def _tar(data: bytes, folder: Path) -> None:
    path = folder / "cifar-100-python.tar.gz"
    path.write_bytes(data if data[:2] == b"\x1f\x8b" else gzip.compress(data, 0))
    cifar_fs.by_class(path)


def _tars() -> list[bytes]:
    part = {"data": np.zeros((100, 3072), np.uint8), "fine_labels": list(range(100))}
    content: dict[str, Any] = {"meta": {"fine_label_names": cifar_fs.FINE}, "train": part}
    small = {"data": np.zeros((0, 3072), np.uint8), "fine_labels": []}
    found = []
    for form, test in ((tarfile.PAX_FORMAT, part), (tarfile.GNU_FORMAT, small)):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as archive:
            for name, value in (content | {"test": test}).items():
                packed = pickle.dumps(value, 2)
                member = tarfile.TarInfo(f"{cifar_fs.FOLDER}/{name}")
                member.size = len(packed)
                archive.addfile(member, io.BytesIO(packed))
        found += [file.getvalue(), gzip.compress(file.getvalue())]
    return found


def _toml(data: bytes, folder: Path) -> None:
    from bench.sweep import read_sweep

    path = folder / "sweep.toml"
    path.write_bytes(data)
    read_sweep(path, {}).cells()


def _tomls() -> list[bytes]:
    return [
        b"algos = ['maml', 'reptile']\nshots = [1, 5]\nseeds = 3\ninner_lr = 0.4\n",
        b"devices = 'cpu'\nmeta_lr = 1e-3\n[set]\ninner_steps = [1, 5]\nnorm = ['support']\n",
        b"datasets = ['sinusoid']\nmodel = 'mlp'\ndownload = true\ndata_root = 'x'\nmeta_clip=1\n",
    ]


def _cell(data: bytes, folder: Path) -> None:
    """A run whose second cell has this as its cell.json, in the folder that its settings ask for,
    and this as its failures.json: it is refused in a line, or everything that reads a run goes on
    with it."""
    # Here, because it takes seconds, and other targets read no results.
    from bench import paper, report, tables
    from bench.regression import check
    from bench.store import RECORD, Run
    from bench.sweep import Cell
    from tests.bench.made_up import add, cell_of

    sound = cell_of("maml", episodes=20)
    run = Run(folder / "run")
    if not run.cells.is_dir():
        run.cells.mkdir(parents=True)
        add(run, sound)
        add(run, cell_of("anil", episodes=20))
    (other,) = (path for path in run.cells.iterdir() if path.name != sound.id)
    try:
        name = Cell(**json.loads(data)["settings"]).id
    except Exception:
        name = "0123456789abcdef"
    if name == sound.id:
        return
    other = other.rename(run.cells / name)
    (other / RECORD).write_bytes(data)
    (run.folder / "failures.json").write_bytes(data)
    reason = ""
    try:
        run.sound(name)
    except DamagedError as error:
        reason = str(error)
    assert reason == printable(reason)
    if reason and not run.failures():
        return
    found = tables.read(run)
    run.summary()
    compared = report.compared_pairs(found, run.lost())
    report.page(run.folder, found, compared).encode()
    paper.markdown("run", found, compared.rows, compared.lines(), "").encode()
    paper.latex(found, compared.rows).encode()
    check(run.folder, run.folder).markdown().encode()


def _cells() -> list[bytes]:
    from tests.bench.made_up import cell_of

    cell = cell_of("anil", episodes=20)
    figures = {"metric": "accuracy", "mean": 0.5, "ci95": 0.01, "episode_address": "glyphs/5/1/5"}
    figures |= {"step_ms": 1.5, "engine": "batched", "sample_reuse": 1.2, "ci95_classes": None}
    written = {"settings": cell.model_dump(), "source": "abc", "figures": figures}
    failure = {cell.id: {"settings": cell.model_dump(), "reason": "diverged"}}
    return [json.dumps(written).encode(), json.dumps(failure).encode()]


def _image(data: bytes, folder: Path) -> None:
    path = folder / "picture.png"
    path.write_bytes(data)
    with bombs_refused():
        colour(path, 84)


def _images() -> list[bytes]:
    found = []
    exif = Image.Exif()
    exif[0x0112] = 3
    modes = {"PNG": "RGBA", "JPEG": "RGB", "GIF": "P", "BMP": "RGB", "PPM": "L", "WEBP": "RGB"}
    for kind, mode in (*modes.items(), ("TIFF", "CMYK"), ("PNG", "I;16"), ("PNG", "LA")):
        file = io.BytesIO()
        Image.new(mode, (9, 7)).save(file, kind, exif=exif)
        found.append(file.getvalue())
    return found


def _csv(data: bytes, folder: Path) -> None:
    images = folder / "images"
    if not images.is_dir():
        images.mkdir()
        for name in ("n0153282900000005.jpg", "n0153282900000006.jpg"):
            (images / name).write_bytes(b"")
    table = folder / "train.csv"
    table.write_bytes(data)
    mini_imagenet.listed(table, images)


def _csvs() -> list[bytes]:
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(("filename", "label"))
    for name in ("n0153282900000005.jpg", "n0153282900000006.jpg"):
        writer.writerow((name, "n01532829"))
    return [file.getvalue().encode(), b'\xef\xbb\xbffilename, label\n"n0153282900000005.jpg",n01\n']


TARGETS = {
    "pickle": Target("pickled arrays", _pickle, _pickles),
    "zip": Target("Omniglot's zip archives", _zip, _zips),
    "tar": Target("CIFAR-100's tar.gz archive", _tar, _tars),
    "image": Target("pictures of seven formats", _image, _images),
    "csv": Target("miniImageNet's tables", _csv, _csvs),
    "toml": Target("settings files", _toml, _tomls),
    "cell": Target("results folders: cell.json, failures.json", _cell, _cells),
}
