"""Pickled arrays, read so that the file cannot run anything.

A pickle names functions and calls them. Refusing all names but NumPy's own is not enough: the state
of a pickled dtype can declare objects to be plain bytes, and an array of that dtype turns the
file's bytes into pointers. So the few names that a pickled array needs stand here for replacements
that make arrays of plain numbers and nothing else; every other name is refused before it is
imported.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from datasets.episodes import DatasetError

NUMBERS = "biuf"
"""Kinds of dtype that can be read: booleans, integers and floats."""


def read(file: IO[bytes], where: str) -> Any:
    """What a pickle of numbers, text, arrays and builtin containers holds.

    Byte strings of Python 2 are read as Latin-1, as NumPy's arrays of that age need.

    Args:
        file: open for reading.
        where: what to call it in a message.

    Raises:
        DatasetError: a pickle that is cut short or corrupt, or one that asks for anything more;
            the message says for what.
    """
    try:
        return _Unpickler(file, encoding="latin1").load()
    except DatasetError as error:
        raise DatasetError(f"{where} {error}") from None
    except Exception as error:  # any opcode can fail in a way of its own over corrupt data
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DatasetError(f"{where} is not a whole pickle of arrays: {reason}") from error


class _DType:
    """For ``numpy.dtype``: a plain number, with nothing of its state but the byte order."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        self.plain = np.dtype(code)
        if self.plain.kind not in NUMBERS:
            raise DatasetError(f"asks for values of type {self.plain}; only numbers are read")

    def __setstate__(self, state: Sequence[Any]) -> None:
        self.plain = self.plain.newbyteorder(state[1])


def _bytes(data: bytes | str) -> bytes:
    """The memory of an array; text is what Python 2 called a string.

    Nothing else: over another array's memory, the new one would outlive it.
    """
    if not isinstance(data, bytes | bytearray | str):
        raise DatasetError(f"asks for an array over a {type(data).__name__}, not over bytes")
    return data.encode("latin1") if isinstance(data, str) else data


class _Array(npt.NDArray[Any]):
    """For ``numpy.ndarray``, and the functions that make one again."""

    @classmethod
    def reconstruct(cls, *_: object) -> _Array:
        """For ``_reconstruct``: an empty array, to be filled from its state."""
        return super().__new__(cls, (0,), np.uint8)

    def __setstate__(self, state: Sequence[Any]) -> None:
        _, shape, dtype, fortran, data = state
        raw = _bytes(data)
        np.frombuffer(raw, dtype.plain).reshape(shape)  # raises if they do not fit
        super().__setstate__((1, shape, dtype.plain, bool(fortran), raw))  # type: ignore[arg-type]

    @classmethod
    def from_buffer(
        cls,
        data: bytes,
        dtype: _DType,
        shape: Sequence[int],
        order: Any,
        axes: Sequence[int] | None = None,
    ) -> npt.NDArray[Any]:
        """For ``_frombuffer`` (protocol 5); ``axes`` is the order of dimensions in memory."""
        flat = np.frombuffer(_bytes(data), dtype.plain)
        if axes is None:
            return flat.reshape(shape, order=order)
        return flat.reshape(shape).transpose(axes)

    @classmethod
    def scalar(cls, dtype: _DType, data: bytes | str) -> Any:
        """For ``scalar``: one number."""
        return np.frombuffer(_bytes(data), dtype.plain)[0]


# What a pickle may ask for. It can set attributes of whatever lets it; none of these do.
_NAMES: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): str.encode,
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): "numpy.ndarray",
}
for _core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    _NAMES[f"{_core}.multiarray", "_reconstruct"] = _Array.reconstruct
    _NAMES[f"{_core}.multiarray", "scalar"] = _Array.scalar
    _NAMES[f"{_core}.numeric", "_frombuffer"] = _Array.from_buffer


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise DatasetError(
                f"asks for {module}.{name}, which is no part of an array; nothing of it was run"
            )
        return _NAMES[module, name]
