"""What this machine has for the benchmark, what is missing, and what to do about it.

Each finding is ok, a warning (something works less well, or is not there for whoever needs it) or a
fault (the main job cannot be done, or would be wrong). What cannot be found out is said, not
guessed.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
import torch
from packaging.requirements import InvalidRequirement, Requirement

import algorithms
import datasets
from algorithms import AlgorithmError, kernels, models
from algorithms.verification import verify
from bench.environment import blas, cpu_name
from bench.making import GRADIENT_TOLERANCE
from bench.sweep import best_device
from datasets import DatasetError
from datasets.base import APPLICATION, cache_folder, data_root

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Level = Literal["ok", "warning", "fault"]
PYTHON = (3, 10)
NEEDED_BYTES = 2**30
"""Memory and disk space under which the main job, which needs a few hundred MiB, may run out."""
TURNS = 3
BUILT_IN = ("glyphs", "sinusoid")


@dataclass(frozen=True)
class Finding:
    """One line: what it is about, how it stands, what was found, and what to do about it."""

    about: str
    level: Level
    found: str
    remedy: str = ""

    @property
    def line(self) -> str:
        """The finding for a terminal."""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.level:<8} {self.about:<14} {self.found}{remedy}"


def examine(root: Path | None = None) -> Iterator[Finding]:
    """Everything there is to say of this machine, quick things first.

    Args:
        root: folder of the data sets; None for the usual one.
    """
    yield python()
    yield from packages()
    yield name_of_datasets()
    yield from processor()
    yield memory()
    yield from accelerators()
    yield from tools()
    yield from disks()
    yield from data(root)
    yield from engines()
    yield from products()


# Software


def python() -> Finding:
    """The interpreter."""
    found = f"Python {platform.python_version()} at {sys.executable}"
    if sys.version_info[:2] < PYTHON:
        return Finding("python", "fault", found, "3.10 or newer is needed")
    return Finding("python", "ok", found)


def requirements() -> tuple[list[str], dict[str, list[str]]]:
    """What the project needs, and what its extras do, as ``pyproject.toml`` says where this is a
    checkout, else as the installed package does."""
    file = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        return project["dependencies"], project["optional-dependencies"]
    needed: list[str] = []
    extras: dict[str, list[str]] = {}
    for text in metadata.requires(APPLICATION) or []:
        requirement, _, marker = text.partition(";")
        extra = marker.partition("extra ==")[2].strip(" \"'()")
        (extras.setdefault(extra, []) if extra else needed).append(requirement if extra else text)
    return needed, extras


def packages() -> Iterator[Finding]:
    """The packages against the ranges that the project asks for."""
    try:
        needed, extras = requirements()
    except (OSError, KeyError, ValueError, metadata.PackageNotFoundError):
        yield Finding(
            "packages", "warning", "neither pyproject.toml nor metadata say what is needed"
        )
        return
    wrong = [fault for text in needed if (fault := lacking(text))]
    for fault in wrong:
        yield Finding("packages", "fault", fault, "make venv, or pip install what is named")
    if not wrong:
        yield Finding("packages", "ok", f"all {len(needed)} are there, in the ranges asked for")
    for extra, texts in extras.items():
        own = [text for text in texts if not text.startswith(APPLICATION)]
        faults = [fault for text in own if (fault := lacking(text))]
        found = "; ".join(faults) or f"all {len(own)} are there"
        remedy = f"only for what needs it: pip install '.[{extra}]'" if faults else ""
        yield Finding(f"extra {extra}", "warning" if faults else "ok", found, remedy)


def lacking(text: str) -> str:
    """What is wrong with an installed package; nothing where it is as asked for, or not needed on
    this Python."""
    try:
        asked = Requirement(text)
    except InvalidRequirement:
        return ""
    if asked.marker is not None and not asked.marker.evaluate({"extra": ""}):
        return ""
    try:
        version = metadata.version(asked.name)
    except metadata.PackageNotFoundError:
        return f"{asked.name} is missing"
    if asked.specifier.contains(version, prereleases=True):
        return ""
    return f"{asked.name} is {version}, not {asked.specifier}"


def name_of_datasets() -> Finding:
    """Whose ``datasets`` is imported; were it not ours, no command would have begun."""
    found = f"'datasets' is this project's, {Path(datasets.__file__).parent}"
    with suppress(metadata.PackageNotFoundError):
        other = metadata.version("datasets")
        return Finding(
            "datasets",
            "warning",
            f"{found}; Hugging Face's {other} is installed too",
            "where that comes first, commands stop with one line: use another environment",
        )
    return Finding("datasets", "ok", f"{found}, and Hugging Face's is not installed")


# The machine


def processor() -> Iterator[Finding]:
    """Cores, and the threads that torch uses on them."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores, threads = usable or 1, torch.get_num_threads()
    found = f"{cpu_name()}; usable cores: {cores}, torch's threads: {threads}, {blas()}"
    if threads > cores:
        yield Finding("cpu", "warning", found, f"set OMP_NUM_THREADS={cores} or fewer")
    else:
        yield Finding("cpu", "ok", found)
    load = psutil.getloadavg()[0]
    if load > cores:
        yield Finding(
            "load",
            "warning",
            f"{load:.1f} processes want {cores} cores",
            "times will be long and noisy: measure when the machine is idle",
        )
    else:
        yield Finding("load", "ok", f"{load:.1f} processes want {cores} cores")


def memory() -> Finding:
    """What is free, within a container's limit too."""
    free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    with suppress(OSError, ValueError):  # "max" where there is no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free, total = min(free, limit - used), min(total, limit)
    found = f"{_gib(free)} free of {_gib(total)}"
    if free < NEEDED_BYTES:
        return Finding("memory", "warning", found, "the main job may run out of it")
    return Finding("memory", "ok", found)


def accelerators() -> Iterator[Finding]:
    """Devices that torch can use, tried with one product, and NVML, which tells their energy."""
    device = best_device()
    if device == "cpu":
        if shutil.which("nvidia-smi") and torch.version.cuda is None:
            remedy = "install a build of torch with CUDA, from pytorch.org"
            yield Finding("accelerator", "warning", "a driver, but torch is without CUDA", remedy)
        else:
            yield Finding("accelerator", "ok", "none; runs are on the CPU unless told otherwise")
        return
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or [device]
    try:
        torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        yield Finding("accelerator", "fault", f"{names[0]}: {said}", "run with --devices cpu")
        return
    yield Finding("accelerator", "ok", f"{', '.join(names)}; runs are on {device} by default")
    if torch.cuda.is_available():
        yield nvml()


def nvml() -> Finding:
    """Whether the GPU's energy can be read."""
    from bench.measure import energy_joules

    if energy_joules(torch.device("cuda:0")) is None:
        remedy = "energy stays empty: pip install '.[gpu]'"
        return Finding("nvml", "warning", "does not tell this GPU's energy", remedy)
    return Finding("nvml", "ok", "tells this GPU's energy")


def tools() -> Iterator[Finding]:
    """What the fast engine and the report's tests want; the main job does without."""
    if reason := kernels.missing():
        remedy = "the batched engine is slower without: apt-get install gcc"
        yield Finding("kernels", "warning", f"not compiled: {reason}", remedy)
    else:
        yield Finding("kernels", "ok", "the batched engine's are compiled for this machine")
    names = (os.environ.get("BENCH_CHROMIUM", ""), "chromium", "google-chrome")
    browser = next((p for n in names if n and (p := shutil.which(n))), None)
    if browser:
        yield Finding("chromium", "ok", browser)
    else:
        remedy = "only for the report's own tests: apt-get install chromium, or BENCH_CHROMIUM=PATH"
        yield Finding("chromium", "warning", "not there", remedy)


def disks() -> Iterator[Finding]:
    """Space, and the right to write, where results and derived data go."""
    for about, folder in (("results", Path("results")), ("cache", cache_folder())):
        there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())
        free = shutil.disk_usage(there).free
        found = f"{folder}: {_gib(free)} free"
        writable = os.access(there, os.W_OK)
        if about == "cache" and not writable:
            yield Finding(about, "warning", f"{folder} cannot be written", "data is derived anew")
        elif not writable:
            yield Finding(about, "fault", f"{there} cannot be written", "--out FOLDER elsewhere")
        elif free < NEEDED_BYTES:
            yield Finding(about, "warning", found, "free some, or use another disk")
        else:
            yield Finding(about, "ok", found)


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


# Data


def data(root: Path | None) -> Iterator[Finding]:
    """Each dataset: read where it is there, else what would get it. Only built-in data, which the
    main job uses unless told otherwise, must be there."""
    folder = root or data_root()
    origin = "--data-root" if root else "$BENCH_DATA" if os.environ.get("BENCH_DATA") else "default"
    if folder.is_dir():
        yield Finding("data", "ok", f"looked for in {folder} ({origin})")
    else:
        remedy = "only for data that is not built in; give --data-root, or set BENCH_DATA"
        yield Finding("data", "ok", f"{folder} ({origin}) is not there", remedy)
    for name in datasets.names():
        kind = datasets.get(name)
        try:
            kind(root=folder).load("val" if "val" in kind.splits else kind.splits[0])
        except (DatasetError, OSError) as error:
            level: Level = "fault" if name in BUILT_IN else "warning"
            yield Finding(name, level, f"cannot be used: {error}")
        else:
            yield Finding(name, "ok", "there")


# Arithmetic


def engines() -> Iterator[Finding]:
    """Whether both engines come to one meta-gradient here, for each algorithm that has both."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 2, 6, 1, 28, 28, generator=generator)
    labels = torch.arange(3).repeat(2, 2)
    batch = {"train": (images[0], labels), "test": (images[1], labels)}
    errors: dict[str, float] = {}
    refused: list[str] = []
    for name in algorithms.names():
        model = models.build("conv4", (1, 28, 28), 3, seed=0)
        try:
            errors[name] = verify(name, model, batch, {"engine": "batched"})
        except (AlgorithmError, TypeError):
            refused.append(name)
    wrong = {name: error for name, error in errors.items() if not error < GRADIENT_TOLERANCE}
    for name, error in wrong.items():
        found = f"{name}: the batched gradient is {error:.1e} from that by higher"
        yield Finding("engines", "fault", found, "use --engine higher, and report it")
    if not wrong:
        worst = max(errors.values(), default=0.0)
        found = f"agree to {worst:.0e} in float64, for {len(errors)} algorithms on conv4"
        yield Finding("engines", "ok", found)
    if refused:
        yield Finding("engines", "ok", f"not asked: {', '.join(refused)}, which take no such batch")


def products() -> Iterator[Finding]:
    """The rate of matrix products, which is what a step could reach at best."""
    from bench.measure import CALIBRATION_PRODUCTS, CALIBRATION_SIDE, calibrate, meter_for

    for device in dict.fromkeys(("cpu", best_device())):
        meter = meter_for(device)
        calibrate(device)  # the first one makes libraries load
        seconds = []
        for _ in range(TURNS):
            meter.start()
            calibrate(device)
            seconds.append(float(meter.stop()["seconds"]))
        rate = 2 * CALIBRATION_SIDE**3 * CALIBRATION_PRODUCTS / statistics.median(seconds)
        found = f"{rate / 1e9:,.0f} GFLOP/s in float32 on {device} (median of {TURNS})"
        yield Finding("products", "ok", found)
