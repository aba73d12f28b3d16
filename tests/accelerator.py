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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

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
    """

    launched: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    copied: int = 0


class _Module(backend_registration._DummyBackendModule):
    """What torch looks for under ``torch.accel``."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


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

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        there = any(isinstance(each, Elsewhere) for each in tree_leaves((args, kwargs)))
        if there or _is_accelerator(kwargs.get("device")):
            return _computed(operator, args, kwargs, self.log)
        return operator(*args, **kwargs)


@contextmanager
def accelerator() -> Iterator[Log]:
    """An accelerator, as the device :data:`DEVICE`."""
    with Accelerator() as mode:
        yield mode.log


def _is_accelerator(device: Any) -> bool:
    return device is not None and torch.device(device).type == "accel"


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Elsewhere) else value


def _computed(operator: Any, args: Any, kwargs: dict[str, Any], log: Log) -> Any:
    name = operator._schema.name.removeprefix("aten::")
    if name in ("_to_copy", "copy_"):
        return _copied(operator, name, args, kwargs, log)
    given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    strangers = [each for each in given if not isinstance(each, Elsewhere) and each.dim()]
    if strangers or (kwargs.get("device") and not _is_accelerator(kwargs["device"])):
        shapes = [tuple(each.shape) for each in strangers]
        raise RuntimeError(f"{name} mixes tensors of {DEVICE} with such of the CPU's: {shapes}")
    if name in ASKING:
        log.asked.append(f"{name} in {_caller()}")
    if kwargs.get("device"):
        kwargs = kwargs | {"device": "cpu"}
    found = operator(*tree_map(_held, args), **tree_map(_held, kwargs))
    if name not in ALLOCATING and not _is_view(operator):
        log.launched.append(name)
    if name == "_local_scalar_dense":
        return found
    # What an operator changes in place, it gives back as the tensor it was given.
    known = {id(each.held): each for each in given if isinstance(each, Elsewhere)}

    def told(value: Any) -> Any:
        if id(value) in known:
            return known[id(value)]
        return Elsewhere(value) if isinstance(value, Tensor) else value

    return tree_map(told, found)


def _copied(operator: Any, name: str, args: Any, kwargs: dict[str, Any], log: Log) -> Any:
    """A copy, the one operator that may go from one memory to the other."""
    if name == "copy_":
        to, source = (isinstance(each, Elsewhere) for each in args[:2])
        log.copied += to is not source
        if source and not to:
            log.asked.append(f"{name} in {_caller()}")
        operator(*tree_map(_held, args), **kwargs)
        return args[0]
    source, target = args[0], kwargs.get("device") or args[0].device
    log.copied += isinstance(source, Elsewhere) is not _is_accelerator(target)
    if isinstance(source, Elsewhere) and not _is_accelerator(target):
        log.asked.append(f"{name} in {_caller()}")
    kept = {key: value for key, value in kwargs.items() if key != "device"}
    made = operator(_held(source), **kept)
    return Elsewhere(made) if _is_accelerator(target) else made


def _is_view(operator: Any) -> bool:
    aliases = [each.alias_info for each in operator._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _caller() -> str:
    """The line of this project that is being run."""
    for frame in reversed(traceback.extract_stack()):
        if any(f"/{package}/" in frame.filename for package in ("algorithms", "bench", "datasets")):
            return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"
    return "?"
