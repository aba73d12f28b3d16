from __future__ import annotations

import builtins
import collections
import functools
import io
import os
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datasets import DatasetError, pickles

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def read(content: bytes) -> Any:
    return pickles.read(io.BytesIO(content), "data.pkl")


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.uint8).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(24).reshape(2, 3, 4).transpose(1, 2, 0),
        np.arange(12, dtype=np.int32)[::2],
        np.arange(5, dtype=">i2"),
        np.array([True, False]),
        np.zeros((300, 84, 3), dtype=np.uint8),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_of_numbers_come_back(array: np.ndarray, protocol: int) -> None:
    assert np.array_equal(read(pickle.dumps(array, protocol)), array)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_containers_and_scalars_come_back(protocol: int) -> None:
    content = {"rows": [np.int64(3), 4], "names": ("a", None, 2.5, True), "raw": b"\xff"}
    assert read(pickle.dumps(content, protocol)) == content


def test_arrays_and_strings_of_python_2_come_back() -> None:
    # Protocol 2 as Python 2 wrote it: its byte strings, and NumPy's old module names.
    content = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        b"K\x00\x85U\x01b\x87R(K\x01K\x02K\x02\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x04\x00\x7f\x80\xfftb"
        b"U\x06labels]K\x07au."
    )
    found = read(content)
    assert found["labels"] == [7]
    assert np.array_equal(found["data"], np.array([[0, 127], [128, 255]], dtype=np.uint8))


class Exploit:
    """Pickles to a call of ``function``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def call(module: str, name: str, *arguments: Any) -> bytes:
    """A pickle that calls a function by name, which need not exist here."""
    packed = pickle.dumps(arguments, 2)[2:-1]
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + packed + b"R."


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"image_data": [x]}], ids=["bare", "deep"])
def test_a_command_in_a_pickle_is_refused_and_not_run(
    tmp_path: Path, wrap: Any, protocol: int
) -> None:
    proof = tmp_path / "proof"
    exploit = pickle.dumps(wrap(Exploit(os.system, f"touch {proof}")), protocol)
    with pytest.raises(DatasetError, match=r"data.pkl asks for (posix|nt).system"):
        read(exploit)
    assert not proof.exists()
    pickle.loads(exploit)
    assert proof.exists(), "the exploit would not have worked at all"


def test_a_command_in_an_arrays_elements_is_refused_and_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    array = np.array([Exploit(os.system, f"touch {proof}")], dtype=object)
    with pytest.raises(DatasetError, match="asks for"):
        read(pickle.dumps(array))
    assert not proof.exists()


@pytest.mark.parametrize(
    "exploit",
    [
        Exploit(builtins.eval, "1"),
        Exploit(builtins.exec, "1"),
        Exploit(builtins.getattr, 1, "real"),
        Exploit(builtins.__import__, "os"),
        Exploit(builtins.open, "/etc/hostname"),
        Exploit(functools.partial, builtins.eval),
        Exploit(np.load, "x.npy"),
        Exploit(np.fromfile, "x"),
        Exploit(np.frompyfunc, len, 1, 1),
        Exploit(pickle.loads, b"N."),
        Exploit(bytearray, b"x"),
        collections.OrderedDict(a=1),
        Path("x"),
        np.random.default_rng(0),
    ],
    ids=lambda exploit: getattr(exploit, "call", [type(exploit)])[0].__name__,
)
def test_names_that_no_array_needs_are_refused(exploit: object) -> None:
    with pytest.raises(DatasetError, match=r"data.pkl asks for [\w.]+, which is no part"):
        read(pickle.dumps(exploit))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("numpy.core.multiarray", "fromfile"),
        ("numpy._core.multiarray", "frombuffer"),
        ("numpy._core.multiarray", "_reconstruct.__class__"),
        ("numpy", "ndarray.tofile"),
        ("numpy", "core.multiarray._reconstruct"),
        ("numpy.testing._private.utils", "runstring"),
        ("_codecs", "decode"),
        ("codecs", "encode"),
        ("datasets.pickles", "read"),
    ],
)
def test_names_beside_those_that_are_needed_are_refused(module: str, name: str) -> None:
    with pytest.raises(DatasetError, match=f"asks for {module}.{name}, which"):
        read(call(module, name, "x"))


@pytest.mark.parametrize("code", ["O", "V8", "S4", "U4", "M8[s]", "u1,O"])
def test_values_that_are_not_numbers_are_refused(code: str) -> None:
    with pytest.raises(DatasetError, match="only numbers are read"):
        read(call("numpy", "dtype", code))


def build(target: bytes, state: Any) -> bytes:
    """A pickle that gives ``state`` to what ``target`` pickles."""
    return target.removesuffix(b".") + pickle.dumps(state, 2)[2:-1] + b"b."


@pytest.mark.parametrize(
    "state",
    [
        (3, "|", None, ("a",), {"a": (1, 0)}, 8, 8, 0),
        (3, "|", None, None, None, 800, 1, 0),
        (3, "|", ("u1", (4,)), None, None, 8, 8, 63),
    ],
)
def test_the_state_of_a_dtype_cannot_make_it_another(state: Any) -> None:
    dtype = read(build(call("numpy", "dtype", "u1", False, True), state))
    assert dtype.plain == np.dtype("u1")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("_codecs", "encode"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy._core.numeric", "_frombuffer"),
    ],
)
def test_a_pickle_cannot_change_what_it_is_given(module: str, name: str) -> None:
    reference = b"\x80\x02c" + f"{module}\n{name}\n".encode()
    for attribute in ("__call__", "__setstate__", "__init__", "plain", "__func__", "__defaults__"):
        with pytest.raises(DatasetError):
            read(build(reference, (None, {attribute: 1})))
    assert np.array_equal(read(pickle.dumps(np.arange(3))), np.arange(3))


def test_an_array_over_another_arrays_memory_is_refused() -> None:
    content = pickle.dumps(np.arange(8, dtype=np.uint8), 5)
    operation = next(op for op in pickletools.genops(content) if op[0].name == "BYTEARRAY8")
    start, length = operation[2], 9 + 8
    array = pickle.dumps(np.arange(8, dtype=np.uint8), 2)[2:-1]
    nested = content[:2] + content[11:start] + array + content[start + length :]
    with pytest.raises(DatasetError, match="asks for an array over a"):
        read(nested)


def test_a_pickle_cut_short_anywhere_is_one_line() -> None:
    content = pickle.dumps({"image_data": np.arange(9), "class_dict": {"n1": [0, 1]}}, 2)
    for end in range(len(content)):
        with pytest.raises(DatasetError, match=r"^data.pkl ") as caught:
            read(content[:end])
        assert "\n" not in str(caught.value)


def test_damage_anywhere_is_read_or_refused_but_never_anything_else() -> None:
    content = pickle.dumps({"image_data": np.arange(9), "class_dict": {"n1": [0, 1]}}, 2)
    refused = 0
    for position in range(2, len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 0x55
        try:
            read(bytes(damaged))
        except DatasetError:
            refused += 1
    assert refused > len(content) / 2


# Pickles that would fill the memory or never end


def doubled(times: int) -> bytes:
    """A tuple of itself twice, and so on: small in memory, and without end to whoever walks it."""
    return b"(t" + b"2\x86" * times


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02Nr\xff\xff\xff\xff.", None),  # a memo of 2**32 entries: 64 GB in C
        (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x00x.", "ends too early"),  # 2**56 bytes
        (b"\x80\x05\x96" + b"\x00" * 5 + b"\xff\x00\x00x.", "ends too early"),
        (b"\x80\x04\x95" + b"\xff" * 7 + b"\x00N.", "ends too early"),  # a frame of as many
        (b"\x80\x02U\xffab.", "ends too early"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", "ends too early"),
        (b"\x80\x02}" + doubled(60) + b"Ns.", "has a tuple for a key"),
        (b"\x80\x02(" + doubled(60) + b"Nd.", "has a tuple for a key"),
        (b"\x80\x02}(" + doubled(60) + b"Nu.", "has a tuple for a key"),
        (b"\x80\x04\x8f(" + doubled(60) + b"\x90.", "has a tuple for a key"),
        (b"\x80\x04(" + doubled(60) + b"\x91.", "has a tuple for a key"),
        (b"\x80\x02}\x8a\x09" + b"\x01" * 9 + b"Ns.", "more than 60 bits"),
        (b"\x80\x02cnumpy\ndtype\n" + doubled(60) + b"\x85R.", "only numbers are read"),
        (b"\x80\x02" + b"N0" * 2_000_000 + b"N.", "more than 2,000,000 instructions"),
    ],
)
def test_a_pickle_cannot_ask_for_memory_or_time_that_it_does_not_take_itself(
    content: bytes, message: str | None
) -> None:
    if message is None:
        assert read(content) is None
        return
    with pytest.raises(DatasetError, match=message):
        read(content)


def test_a_message_does_not_show_all_of_an_endless_name() -> None:
    with pytest.raises(DatasetError, match="nothing of it was run") as caught:
        read(b"\x80\x02cos\n" + b"x" * 100_000 + b"\n.")
    assert len(str(caught.value)) < 300


def test_an_array_of_a_shape_that_its_bytes_do_not_fill_is_refused() -> None:
    array = pickle.dumps(np.arange(4, dtype=np.uint8), 2)
    assert array.count(b"K\x01K\x04\x85") == 1
    for shape in (b"\x8a\x05\xff\xff\xff\xff\x7f\x85", b"K\xffK\xff\x86", b"K\x05\x85"):
        with pytest.raises(DatasetError, match="not a whole pickle"):
            read(array.replace(b"K\x01K\x04\x85", b"K\x01" + shape))


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02(I1\nidatetime\ndate\n.",  # INST
        b"\x80\x02(cnumpy\nndarray\no.",  # OBJ
        b"\x80\x02cnumpy\nndarray\n)\x81.",  # NEWOBJ
        b"\x80\x04cnumpy\nndarray\n)}\x92.",  # NEWOBJ_EX
        b"Pname\n.",  # PERSID
        b"\x80\x02NQ.",  # BINPERSID
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x05\x97.",  # NEXT_BUFFER
    ],
)
def test_instructions_that_make_objects_are_refused(content: bytes) -> None:
    with pytest.raises(DatasetError, match="that no array needs"):
        read(content)


@pytest.mark.parametrize(
    "content", [b"\x80\x02cnumpy\nndarray\nNa.", b"\x80\x02]NNs.", b"\x80\x02](NNu."]
)
def test_only_containers_are_added_to(content: bytes) -> None:
    with pytest.raises(DatasetError, match="adds to a"):
        read(content)
