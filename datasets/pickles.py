"""Pickled arrays, read so that the file can neither run anything nor fill the memory.

A pickle is a program for a small machine, which names functions and calls them. Refusing all names
but NumPy's own is not enough: the state of a pickled dtype can declare objects to be plain bytes,
and an array of that dtype turns the file's bytes into pointers. So the few names that a pickled
array needs stand here for replacements that make arrays of plain numbers and nothing else; every
other name is refused before it is imported.

Nor is the machine itself safe: one instruction can ask for a memo of 2**32 entries, or for 2**60
bytes, and a tuple of itself twice, thirty times over, has a hash that takes forever. So it is
Python's own machine in Python (whose memo is a dictionary), with the instructions that make data
alone, over a file that gives no more than it has, and for a limited number of steps.
"""

from __future__ import annotations

import os
import pickle
import re
import struct
from collections.abc import Callable, Sequence
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from datasets.episodes import DatasetError

NUMBERS = "biuf"
"""Kinds of dtype that can be read: booleans, integers and floats."""

MOST_STEPS = 2_000_000
"""Instructions of one pickle. CIFAR-100's largest has some 300,000, and each makes one object."""

PLAIN = (str, bytes, int, float, bool, type(None), np.generic)
"""What a key may be: a container's hash can take forever."""


def read(file: IO[bytes], where: str) -> Any:
    """What a pickle of numbers, text, arrays and builtin containers holds.

    Byte strings of Python 2 are read as Latin-1, as NumPy's arrays of that age need.

    Args:
        file: open for reading, one that can seek.
        where: what to call it in a message.

    Raises:
        DatasetError: a pickle that is cut short or corrupt, or one that asks for anything more;
            the message says for what.
    """
    try:
        return _Unpickler(_Bounded(file), encoding="latin1").load()
    except DatasetError as error:
        raise DatasetError(f"{where} {error}") from None
    except Exception as error:  # any instruction can fail in a way of its own over corrupt data
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DatasetError(f"{where} is not a whole pickle of arrays: {reason}") from error


def integers(value: Any) -> npt.NDArray[np.integer[Any]]:
    """A list of integers that was read, or an array of them ``(n,)``.

    Raises:
        ValueError: it is anything else.
    """
    if isinstance(value, list | tuple) and all(type(item) is int for item in value):
        value = np.array(value, dtype=np.int64) if value else np.empty(0, np.int64)
    if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype.kind not in "iu":
        raise ValueError("not a list of integers")
    return value


class _Bounded:
    """A file that is asked for what it has: memory for more is not even set aside."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        here = file.tell()
        self.left = file.seek(0, os.SEEK_END) - here
        file.seek(here)

    def read(self, count: int) -> bytes:
        """``count`` bytes."""
        if not 0 <= count <= self.left:
            raise EOFError("it ends too early")
        self.left -= count
        return self.file.read(count)

    def readline(self) -> bytes:
        """A line with its end."""
        line = self.file.readline(self.left)
        self.left -= len(line)
        return line


class _DType:
    """For ``numpy.dtype``: a plain number, with nothing of its state but the byte order."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if type(code) is not str or not re.fullmatch(r"[<>=|]?[?\w]\d{0,2}(\[\w+\])?", code):
            raise DatasetError(
                "asks for values that are not one number each; only numbers are read"
            )
        self.plain = np.dtype(code)
        if self.plain.kind not in NUMBERS:
            raise DatasetError(f"asks for values of type {self.plain}; only numbers are read")

    def __setstate__(self, state: Sequence[Any]) -> None:
        order = {"<": "little", ">": "big", "|": "|"}[state[1]]
        self.plain = self.plain.newbyteorder(order)  # type: ignore[arg-type]


def _bytes(data: bytes | str) -> bytes:
    """The memory of an array; text is what Python 2 called a string.

    Nothing else: over another array's memory, the new one would outlive it.
    """
    if not isinstance(data, bytes | bytearray | str):
        raise DatasetError(f"asks for an array over a {type(data).__name__}, not over bytes")
    return data.encode("latin1") if isinstance(data, str) else data


def _encode(text: str, encoding: str) -> bytes:
    """For ``_codecs.encode``: bytes, as protocols below 3 write them."""
    if type(text) is not str or encoding != "latin1":
        raise ValueError("bytes are written in latin1")
    return text.encode("latin1")


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
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): "numpy.ndarray",
}
for _core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    _NAMES[f"{_core}.multiarray", "_reconstruct"] = _Array.reconstruct
    _NAMES[f"{_core}.multiarray", "scalar"] = _Array.scalar
    _NAMES[f"{_core}.numeric", "_frombuffer"] = _Array.from_buffer


class _Unpickler(pickle._Unpickler):
    """The machine, with the instructions of :data:`_INSTRUCTIONS`."""

    def load(self) -> Any:
        self.left = MOST_STEPS
        return super().load()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            asked = f"{module}.{name}"[:100]
            raise DatasetError(
                f"asks for {asked}, which is no part of an array; nothing of it was run"
            )
        return _NAMES[module, name]


def _step(instruction: Callable[[Any], None]) -> Callable[[Any], None]:
    """An instruction, counted."""

    def counted(machine: Any) -> None:
        machine.left -= 1
        if machine.left < 0:
            raise DatasetError(f"has more than {MOST_STEPS:,} instructions")
        instruction(machine)

    return counted


def _onto(kind: type, instruction: Callable[[Any], None], below: int | None) -> Any:
    """An instruction that adds to a container, and only to one of this kind.

    Args:
        below: how far the container is below the top of the stack; None for under the mark, with
            all above it to be added.
    """
    pairs = kind is dict

    def checked(machine: Any) -> None:
        if below is None:
            container, added = machine.metastack[-1][-1], machine.stack
        else:
            container, added = machine.stack[-1 - below], machine.stack[-below:]
        if type(container) is not kind:
            raise TypeError(f"adds to a {type(container).__name__}")
        if kind is not list:
            _hashable(added[::2] if pairs else added)
        instruction(machine)

    return checked


def _keys(every: int, instruction: Callable[[Any], None]) -> Callable[[Any], None]:
    """An instruction that makes a container of all above the mark, of which some are its keys."""

    def checked(machine: Any) -> None:
        _hashable(machine.stack[::every])
        instruction(machine)

    return checked


def _hashable(keys: Sequence[Any]) -> None:
    for key in keys:
        if not isinstance(key, PLAIN):
            raise TypeError(f"has a {type(key).__name__} for a key")
        if isinstance(key, int) and abs(key) >= 2**60:  # such can be chosen to share one hash
            raise TypeError("has a key of more than 60 bits")


def _build(machine: Any) -> None:
    """BUILD: state for an array or a dtype, which take it as they see fit."""
    state = machine.stack.pop()
    target = machine.stack[-1]
    if not isinstance(target, _Array | _DType):
        raise TypeError(f"gives a {type(target).__name__} a state")
    target.__setstate__(state)


def _bytearray8(machine: Any) -> None:
    """BYTEARRAY8: read before memory is set aside."""
    (count,) = struct.unpack("<Q", machine.read(8))
    machine.append(bytearray(machine.read(count)))


def _put(machine: Any) -> None:
    """PUT: a number of at most as many bits as LONG_BINPUT's."""
    index = int(machine.readline()[:-1])
    if not 0 <= index < 2**32:
        raise ValueError("no place in the memo")
    machine.memo[index] = machine.stack[-1]


_DATA = """
    PROTO FRAME STOP MARK POP POP_MARK DUP
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST EMPTY_DICT DICT EMPTY_SET FROZENSET
    APPEND APPENDS SETITEM SETITEMS ADDITEMS
    PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET
    GLOBAL STACK_GLOBAL REDUCE BUILD"""
"""The instructions that make data, keep and get it, and name what stands in :data:`_NAMES`. Left
out are those that make an object of a class, a persistent or registered one, or one of a buffer
from elsewhere."""


class _Instructions(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> Any:
        raise DatasetError(f"has an instruction ({code:#04x}) that no array needs")


def _instructions() -> dict[int, Callable[[Any], None]]:
    """What the machine does at each of its instructions."""
    found = {name: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _DATA.split()}
    found |= {"BUILD": _build, "BYTEARRAY8": _bytearray8, "PUT": _put}
    for name, kind, below in (
        *(("APPEND", list, 1), ("APPENDS", list, None)),
        *(("SETITEM", dict, 2), ("SETITEMS", dict, None), ("ADDITEMS", set, None)),
    ):
        found[name] = _onto(kind, found[name], below)
    found["DICT"] = _keys(2, found["DICT"])
    found["FROZENSET"] = _keys(1, found["FROZENSET"])
    return _Instructions(
        {getattr(pickle, name)[0]: _step(instruction) for name, instruction in found.items()}
    )


_Unpickler.dispatch = _instructions()
