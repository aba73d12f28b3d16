"""What a result may depend on besides the code: versions, the machine, threads, clocks, flags."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from algorithms import kernels
from bench.errors import printable
from bench.sweep import Sweep

CODE = ("bench", "algorithms", "datasets", "pyproject.toml", "constraints.txt")
PACKAGES = ("torch", "higher", "numpy", "pandas", "scipy", "seaborn", "fewshot-bench")


def environment(sweep: Sweep) -> dict[str, Any]:
    """What a result may depend on besides the code: versions, machine, threads, seeds."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": sys.version.split()[0],
        "packages": {name: version(name) for name in PACKAGES},
        "commit": git_commit(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(logical=False),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "threads": torch.get_num_threads(),
        "blas": blas(),
        "kernels": kernels.missing() or "compiled",
        "clocks": {"wall": clock("perf_counter"), "process": clock("process_time")},
        "seeds": sweep.seeds,
        "eval_seed": sweep.set.get("eval_seed", [0]),
        "deterministic": deterministic(bool(gpus)),
    }


MAKER = ("commit", "processor", "threads", "torch")
"""Figures of a cell that say by what it was trained and tested, which need not be where its run
was started last, nor where it was measured."""


def maker(device: str) -> dict[str, str]:
    """Those of :data:`MAKER` that the process tells which makes a cell: ``processor`` and the
    version of ``torch``."""
    cuda = device.startswith("cuda")
    processor = torch.cuda.get_device_name(device) if cuda else cpu_name()
    return {"processor": printable(processor), "torch": torch.__version__}


def makers(figures: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """By what cells were made, as their figures tell: the values that there are of each of
    :data:`MAKER`, in words."""
    known = list(figures)
    if not known:
        return {}
    return {
        name: ", ".join(dict.fromkeys(str(each.get(name) or "unknown") for each in known))
        for name in MAKER
    }


def blas() -> str:
    """The library that torch's matrix products on the CPU come from, and its version."""
    built = torch.__config__.show()
    name = re.search(r"BLAS_INFO=(\w+)", built)
    library = re.search(r"(?:Math Kernel Library|OpenBLAS) Version ([\w.]+)", built)
    return " ".join(found.group(1) for found in (name, library) if found) or "unknown"


def clock(name: Literal["perf_counter", "process_time"]) -> str:
    """What a clock of Python's reads here, and its resolution."""
    info = time.get_clock_info(name)
    return f"{info.implementation}, {info.resolution:.0e} s"


def deterministic(gpu: bool) -> dict[str, Any]:
    """Whether the same cell gives the same bits, and torch's flags that bear on it."""
    flags = {
        "torch.use_deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch.backends.cudnn.deterministic": torch.backends.cudnn.deterministic,
        "torch.backends.cudnn.benchmark": torch.backends.cudnn.benchmark,
        "torch.backends.cuda.matmul.allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "torch.backends.cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
    }
    on_gpu = "not to the bit: atomic additions in cuDNN's and index kernels" if gpu else None
    return {"cpu": True, "cuda": on_gpu, "flags": flags}


def cpu_name() -> str:
    """The processor's model name, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def git_commit() -> str | None:
    """The commit of this checkout when a process first asks, with ``+`` where its packages have
    changes, new files among them; None outside one."""

    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--", *CODE)
        return git("rev-parse", "HEAD") + ("+" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None
