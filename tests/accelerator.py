"""An accelerator where there is none: tensors in a memory of its own, computed by the CPU.

A tensor here says that it is on the device ``accel:0``, and torch and this project's code treat it
so: no compiled kernel of the CPU's touches it, its gradients are computed on a thread of the
device's own, and an operator that is also given a tensor of the CPU's raises. Where the CPU would
have to wait for it is noted. The arithmetic is the CPU's own, so that results can be held against
it.

What it does not tell: how fast a GPU is, and how it rounds.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "accel:0"
ASKING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal"}
"""Operators whose result, or its shape, the CPU has to wait for."""
ALLOCATING = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty"}
"""Operators that compute nothing."""


@dataclass
class Log:
    """What the accelerator was made to do.

    Attributes:
        launched: operators that compute something, in order; each is a kernel or a few.
        asked: where the CPU waited for a value: the operator and the line that called it.
        copied: copies between the two memories.
        recorded: what was launched, with what on and with what result, since a recording began.
    """

    launched: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    copied: int = 0
    recorded: list[tuple[Any, ...]] | None = None


class _Module(backend_registration._DummyBackendModule):
    """What torch looks for under ``torch.accel``."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


# Torch takes it for the machine's accelerator from then on, and has to know it before the first
# gradient is computed.
if not torch.cuda.is_available():
    backend_registration._setup_privateuseone_for_python_backend("accel", backend_module=_Module())


class Elsewhere(torch.Tensor):
    """A tensor of the accelerator's.

    Attributes:
        held: its values, in memory that only operators here touch.
    """

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __repr__(self) -> str:
        return f"{self.held!r} on {DEVICE}"

    @classmethod
    def __torch_dispatch__(
        cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _computed(operator, args, kwargs or {}, Log())


class Accelerator(TorchDispatchMode):
    """While entered, the accelerator is there, and notes what it is made to do."""

    def __init__(self) -> None:
        super().__init__()
        self.log = Log()

    def capture(
        self, function: Callable[[], Any], device: torch.device
    ) -> tuple[Callable[[], None], Any]:
        """What :func:`algorithms.cuda_graphs.capture` does, and as there nothing is computed yet
        and what would have to be waited for raises."""
        function()
        self.log.recorded = recorded = []
        try:
            results = function()
        finally:
            self.log.recorded = None
        for result in _tensors(results):
            if result.is_floating_point():
                result.held.fill_(torch.nan)
        return partial(_replay, recorded), results

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        there = any(map(_is_there, _tensors((*args, *kwargs.values()))))
        if there or _is_accelerator(kwargs.get("device")):
            return _computed(operator, args, kwargs, self.log)
        return operator(*args, **kwargs)


@contextmanager
def accelerator() -> Iterator[Log]:
    """An accelerator, as the device :data:`DEVICE`; it can be recorded."""
    if torch.cuda.is_available():
        pytest.skip("there is a real accelerator: make gpu-check")
    with Accelerator() as mode, mock.patch("algorithms.cuda_graphs.capture", mode.capture):
        yield mode.log


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """A function of each value of an operator's arguments or results."""
    if isinstance(value, list | tuple):
        return type(value)(_mapped(function, each) for each in value)
    if isinstance(value, dict):
        return {key: _mapped(function, each) for key, each in value.items()}
    return function(value)


def _tensors(value: Any) -> list[Any]:
    found: list[Any] = []
    _mapped(lambda each: found.append(each) if isinstance(each, Tensor) else None, value)
    return found


def _is_accelerator(device: Any) -> bool:
    return device is not None and torch.device(device).type == "accel"


def _is_there(value: Any) -> bool:
    return isinstance(value, Elsewhere)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Elsewhere) else value


def _computed(operator: Any, args: Any, kwargs: dict[str, Any], log: Log) -> Any:
    name = operator._schema.name.removeprefix("aten::")
    given = _tensors((*args, *kwargs.values()))
    there = [_is_there(each) for each in given]
    asked_for = kwargs.get("device")
    if name in ("_to_copy", "copy_"):  # which alone may go from one memory to the other
        target = there[0] if asked_for is None else _is_accelerator(asked_for)
        source = there[-1]
        if source is not target:
            log.copied += 1
            _wait(name, log, noted=source)
    else:
        target = True
        strangers = [tuple(each.shape) for each in given if not _is_there(each) and each.dim()]
        if strangers or not (asked_for is None or _is_accelerator(asked_for)):
            raise RuntimeError(
                f"{name} mixes tensors of {DEVICE} with such of the CPU's: {strangers}"
            )
        if name in ASKING or _by_mask(name, given):
            _wait(name, log, noted=True)
    if asked_for is not None:
        kwargs = kwargs | {"device": "cpu"}
    held_args, held_kwargs = _mapped(_held, args), _mapped(_held, kwargs)
    found = operator(*held_args, **held_kwargs)
    if name not in ALLOCATING and not _is_view(operator):
        log.launched.append(name)
        if log.recorded is not None:
            log.recorded.append((operator, held_args, held_kwargs, found))
    # What an operator changes in place, it gives back as the tensor it was given.
    known = {id(_held(each)): each for each in given}

    def told(value: Any) -> Any:
        if id(value) in known:
            return known[id(value)]
        return Elsewhere(value) if target and isinstance(value, Tensor) else value

    return _mapped(told, found)


def _wait(name: str, log: Log, *, noted: bool) -> None:
    """The CPU waits, which it may not while it records."""
    if noted:
        log.asked.append(f"{name} in {_caller()}")
    if log.recorded is not None:
        raise RuntimeError("operation not permitted when stream is capturing")


def _replay(recorded: list[tuple[Any, ...]]) -> None:
    """Compute again, in the same memory."""
    for operator, args, kwargs, found in recorded:
        again = operator(*args, **kwargs)
        for before, now in zip(_tensors(found), _tensors(again), strict=True):
            if before is not now:
                before.copy_(now)


def _by_mask(name: str, given: Sequence[Tensor]) -> bool:
    """Whether an operator has to find out how many values a mask leaves."""
    return name.startswith("index") and any(each.dtype == torch.bool for each in given[1:])


@cache
def _is_view(operator: Any) -> bool:
    aliases = [each.alias_info for each in operator._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _caller() -> str:
    """The line of this project that is being run."""
    for frame in reversed(traceback.extract_stack()):
        if any(f"/{package}/" in frame.filename for package in ("algorithms", "bench", "datasets")):
            return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"
    return "?"
