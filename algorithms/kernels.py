"""The batched engine's compiled kernels: what it does most of on a CPU, built for this machine.

``kernels.c`` is compiled once, by the C compiler that is there, into the user's cache folder; its
matrix products are those of the BLAS that torch brings. Where it cannot be built or used, torch's
operators do the same work, slower: :data:`reason` says why.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import ClassVar, NamedTuple

import platformdirs
import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ("-O3", "-march=native", "-fno-trapping-math", "-fno-math-errno", "-fopenmp")
LIBRARY = ("-shared", "-fPIC")
KEPT_BYTES = 2**30
"""How much of the memory that a step frees stays with the process for the next one; to get it anew
from the system, page by page, takes a tenth of a step."""
TYPES = {torch.float32: ("float", "sgemm_"), torch.float64: ("double", "dgemm_")}


class KernelsError(RuntimeError):
    """The kernels cannot be built or used here; the message is one line and says why."""


class Geometry(ctypes.Structure):
    """``Geometry`` in ``kernels.c``."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("threads", "tasks", "samples", "height", "width", "channels"),
            *("rows", "columns", "filters", "kernel_height", "kernel_width"),
            *("stride_y", "stride_x", "dilation_y", "dilation_x", "top", "left", "shared"),
        )
    ]


class Layout(ctypes.Structure):
    """``Layout`` in ``kernels.c``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("threads", "groups", "rows", "channels", "relu")),
        *((name, ctypes.c_int64) for name in ("height", "width", "window_height", "window_width")),
        ("eps", ctypes.c_double),
    ]


class Tensors(ctypes.Structure):
    """``Tensors`` in ``kernels.c``."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            *("x", "w", "b", "to_out", "to_y", "through", "u", "v_w", "v_b", "sum_h", "sum_h_y"),
            *("out", "y", "scale", "highest", "to_x", "to_w", "to_b"),
            *("to_to_out", "to_standard", "to_scale"),
        )
    ]


class Windows(NamedTuple):
    """Windows side by side over pictures, whose pixels are the rows of a group, one picture after
    another; what no whole window holds is in none."""

    height: int
    width: int
    window_height: int
    window_width: int

    @property
    def size(self) -> tuple[int, int]:
        """How many windows a picture has: lines and columns of them."""
        return self.height // self.window_height, self.width // self.window_width

    def count(self, pixels: int) -> int:
        """How many there are in so many pixels."""
        return pixels // (self.height * self.width) * math.prod(self.size)


class Kernels:
    """The kernels for one type of numbers. Tensors are on the CPU and of that type.

    Attributes:
        flops: floating-point operations that the convolutions of this process have come to,
            counted as torch counts its own: a kernel's elements twice for each place and filter,
            padding included. Torch's counter does not see these.

    Raises:
        KernelsError: they cannot be built or used here.
    """

    flops: ClassVar[int] = 0

    def __init__(self, dtype: torch.dtype) -> None:
        name, product = TYPES[dtype]
        path = built(name)
        try:
            self.library = ctypes.CDLL(str(path))
        except OSError as error:  # a disk from which nothing may be run, or a file cut short
            raise KernelsError(f"cannot load {path}: {error}") from error
        self.product = ctypes.cast(getattr(_torch_library(), product), ctypes.c_void_p)

    def convolve(
        self, name: str, geometry: Geometry, images: Tensor, kernels: Tensor, outputs: Tensor
    ) -> None:
        """Fill one of three contiguous tensors from the two others.

        Args:
            name: ``"convolution"`` fills the outputs, ``"convolution_to_images"`` and
                ``"convolution_to_kernels"``, its derivatives, what they are named after.
            geometry: all but the threads.
            images: ``(tasks * samples, height, width, channels)``.
            kernels: ``(tasks, filters, kernel_height, kernel_width, channels)``.
            outputs: ``(tasks * samples, rows, columns, filters)``.
        """
        geometry.threads = torch.get_num_threads()
        Kernels.flops += 2 * outputs.numel() * kernels[0, 0].numel()
        function = getattr(self.library, name)
        pointers = [ctypes.c_void_p(_at(each)) for each in (images, kernels, outputs)]
        _checked(function(ctypes.byref(geometry), self.product, *pointers))

    def normalise(
        self,
        rows: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        relu: bool,
        windows: Windows | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What :class:`algorithms.task_normalisation.Normalise` returns, and where of windows the
        outputs are; unless it is to ``keep`` them, without the standardised rows."""
        groups, count, channels = rows.shape
        outputs = rows.new_empty(groups, windows.count(count) if windows else count, channels)
        standard = torch.empty_like(rows) if keep else None
        highest = torch.empty_like(outputs) if keep and windows else None
        scale = rows.new_empty(groups, 1, channels)
        made = {"out": outputs, "y": standard, "scale": scale, "highest": highest}
        self._run("normalise", _layout(rows, relu, windows, eps), x=rows, w=weight, b=bias, **made)
        return outputs, rows.new_empty(0) if standard is None else standard, scale, highest

    def normalise_backward(
        self,
        to_outputs: Tensor,
        to_standard: Tensor | None,
        through: Tensor | None,
        standard: Tensor,
        scale: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        highest: Tensor | None,
        relu: bool,
        windows: Windows | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What :class:`algorithms.task_normalisation.NormaliseBackward` returns."""
        to_rows = torch.empty_like(standard)
        to_weight, to_bias = torch.empty_like(scale), torch.empty_like(scale)
        given = {"y": standard, "scale": scale, "w": weight, "b": bias, "highest": highest}
        given |= {"to_out": to_outputs, "to_y": to_standard, "through": through}
        made = {"to_x": to_rows, "to_w": to_weight, "to_b": to_bias}
        self._run("normalise_backward", _layout(standard, relu, windows), **given, **made)
        return to_rows, to_weight, to_bias

    def normalise_twice(
        self,
        u: Tensor,
        v_weight: Tensor | None,
        v_bias: Tensor | None,
        to_outputs: Tensor,
        standard: Tensor,
        scale: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        highest: Tensor | None,
        sum_h: Tensor,
        sum_h_y: Tensor,
        relu: bool,
        windows: Windows | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What :class:`algorithms.task_normalisation.NormaliseBackward` hands back: to the gradient
        of the outputs, to the standardised rows, to the scale and to the weight."""
        to_to_outputs, to_standard = torch.empty_like(to_outputs), torch.empty_like(standard)
        to_scale, to_weight = torch.empty_like(scale), torch.empty_like(scale)
        given = {"u": u, "v_w": v_weight, "v_b": v_bias, "to_out": to_outputs, "y": standard}
        given |= {"scale": scale, "w": weight, "b": bias, "highest": highest}
        given |= {"sum_h": sum_h, "sum_h_y": sum_h_y}
        made = {"to_to_out": to_to_outputs, "to_standard": to_standard}
        made |= {"to_scale": to_scale, "to_w": to_weight}
        self._run("normalise_twice", _layout(standard, relu, windows), **given, **made)
        return to_to_outputs, to_standard, to_scale, to_weight

    def _run(self, name: str, layout: Layout, **tensors: Tensor | None) -> None:
        pointers = {name: _at(each) for name, each in tensors.items() if each is not None}
        function = getattr(self.library, name)
        _checked(function(ctypes.byref(layout), ctypes.byref(Tensors(**pointers))))


def kernels_for(tensor: Tensor) -> Kernels | None:
    """The kernels for such tensors; None where torch's operators have to do."""
    if tensor.device.type != "cpu" or tensor.dtype not in TYPES:
        return None
    return _kernels_of(tensor.dtype)


def missing() -> str:
    """Why the kernels cannot be used on this machine, in one line; empty where they can."""
    try:
        Kernels(torch.float32)
    except KernelsError as error:
        return str(error)
    return ""


@cache
def _kernels_of(dtype: torch.dtype) -> Kernels | None:
    try:
        return Kernels(dtype)
    except KernelsError:
        return None


def built(name: str) -> Path:
    """The library of ``kernels.c`` for a type of C's, compiled if it is not there yet.

    Raises:
        KernelsError: no compiler, or one that fails.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise KernelsError("there is no C compiler (cc, or what $CC names)")
    command = [compiler, *FLAGS, *LIBRARY, f"-DREAL={name}", str(SOURCE), "-lm"]
    identity = (SOURCE.read_text(encoding="utf-8"), *command, _processor())
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    path = platformdirs.user_cache_path("fewshot-bench") / "kernels" / f"{name}-{digest}.so"
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            aside = Path(folder) / path.name
            subprocess.run([*command, "-o", str(aside)], check=True, capture_output=True, text=True)
            aside.replace(path)  # whole or not at all, whoever else builds
    except subprocess.CalledProcessError as error:
        line = next(iter(error.stderr.splitlines()), f"exit status {error.returncode}")
        raise KernelsError(f"{compiler} cannot build kernels.c: {line}") from error
    except OSError as error:
        raise KernelsError(f"cannot write to {path.parent}: {error.strerror}") from error
    return path


@cache
def _torch_library() -> ctypes.CDLL:
    """The library that has torch's BLAS.

    Raises:
        KernelsError: it has none that can be called.
    """
    if sys.platform != "linux":
        raise KernelsError("they are for Linux")
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        library = ctypes.CDLL(str(path))
        for _, product in TYPES.values():
            getattr(library, product)
    except (OSError, AttributeError) as error:
        raise KernelsError(f"torch's BLAS cannot be called: {error}") from error
    _keep_freed_memory()
    return library


def _keep_freed_memory() -> None:
    trim_threshold, mmap_threshold = -1, -3  # of glibc's malloc.h; other C libraries have no such
    with suppress(AttributeError):
        adjust = ctypes.CDLL(None).mallopt
        adjust(trim_threshold, KEPT_BYTES)
        adjust(mmap_threshold, KEPT_BYTES)


def _processor() -> str:
    """What the compiler builds for: a cache folder may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _layout(rows: Tensor, relu: bool, windows: Windows | None, eps: float = 0.0) -> Layout:
    return Layout(torch.get_num_threads(), *rows.shape, relu, *(windows or (0, 0, 0, 0)), eps)


def _at(tensor: Tensor) -> int:
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _checked(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for what a kernel works in")
