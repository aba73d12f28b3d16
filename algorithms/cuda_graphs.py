"""Meta-steps as CUDA graphs: recorded once, then launched whole.

A step of a small network is hundreds to thousands of kernels, which a GPU runs in less time than
Python takes to launch them. A graph (``torch.cuda.CUDAGraph``) launches all of them by one call: on
the memory that it was recorded on, whatever Python would decide by then.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from algorithms.inner_loop import Tasks

KEPT = 4
"""Recordings that are kept at once, each with the memory of its step: a meta-batch may come in two
sizes of pass, and evaluations take turns with meta-steps."""
WARM_UP = 3
OTHER = 1.1
"""How many times as large the weights are with which a recording is checked."""
TOLERANCE = 1e-2
"""How far a recording's results may be from those computed as ever, relative to these. Both do the
same sums; some kernels add in no fixed order."""


class RecordingError(RuntimeError):
    """A computation cannot be recorded; the message is one line and says why."""


class Recordings:
    """Functions of tasks, as recorded."""

    def __init__(self) -> None:
        self.kept: dict[Hashable, _Recording] = {}

    def run(
        self,
        key: Hashable,
        function: Callable[[Tasks], Any],
        tasks: Tasks,
        state: Sequence[Tensor],
    ) -> Any:
        """``function(tasks)``, recorded unless it is already.

        Args:
            key: tells functions apart, and whatever of Python's they compute with.
            function: computes tensors from tasks and from the state.
            tasks: on a GPU.
            state: tensors that change in place from one run to the next.

        Returns:
            Like the function, without a graph, in memory that the next run will write over.

        Raises:
            RecordingError: it cannot be recorded.
        """
        places = tuple((each.data_ptr(), each.requires_grad) for each in state)
        shapes = tuple((name, t.shape, t.dtype) for name, t in _tensors(tasks).items())
        key = (key, places, shapes)
        recording = self.kept.get(key)
        if recording is None:
            if len(self.kept) >= KEPT:
                # All of them: torch makes few streams, and with a graph goes what others that were
                # recorded on the same one work in.
                self.kept.clear()
            recording = _Recording(function, tasks, state)
            self.kept[key] = recording
        return recording.run(tasks)


class _Recording:
    def __init__(
        self, function: Callable[[Tasks], Any], tasks: Tasks, state: Sequence[Tensor]
    ) -> None:
        others = replace(
            tasks,
            support_inputs=tasks.support_inputs.roll(1, 1).roll(1, -1),
            support_targets=tasks.support_targets.flip(1),
            query_inputs=tasks.query_inputs.roll(1, 1).roll(1, -1),
            query_targets=tasks.query_targets.flip(1),
        )
        device = tasks.support_inputs.device
        self.tasks = replace(tasks, **{name: t.clone() for name, t in _tensors(tasks).items()})
        # What is recorded has to come to what the function does, for other tasks and weights than
        # those it is recorded with; and nothing of that is to be seen in noise or weights.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            with _scaled(state, OTHER):
                expected = _detached(function(others))
            with _scaled(state, 1.0):
                try:
                    self.replay, self.results = capture(
                        lambda: _detached(function(self.tasks)), device
                    )
                except RuntimeError as error:
                    raise RecordingError(_first_cause(error)) from error
            with _scaled(state, OTHER):
                away = _relative_error(self.run(others), expected)
        if not away <= TOLERANCE:
            raise RecordingError(f"what is recorded comes to other results, by {away:.0e} of them")

    def run(self, tasks: Tasks) -> Any:
        for name, value in _tensors(tasks).items():
            getattr(self.tasks, name).copy_(value)
        self.replay()
        return self.results


@contextmanager
def _scaled(state: Sequence[Tensor], by: float) -> Iterator[None]:
    """With a state so many times as large, and always the same noise; the state is put back."""
    before = [each.detach().clone() for each in state]
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            for each in state:
                if each.is_floating_point():
                    each.mul_(by)
        yield
    finally:
        with torch.no_grad():
            for each, value in zip(state, before, strict=True):
                each.copy_(value)


def capture(function: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """Record what a function launches on a GPU.

    Returns:
        What launches it again, and the function's results, which that writes anew.
    """
    # A capture that fails would leave its stream behind as the current one.
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries set themselves up as they are first used
            for _ in range(WARM_UP):
                function()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on loading data meanwhile, but no graph may be destroyed.
        with (
            _no_collection(),
            torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"),
        ):
            results = function()
    return graph.replay, results


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage, such as the recordings of an algorithm that is done with, is collected before."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _first_cause(error: BaseException) -> str:
    """The line of what went wrong first: the end of a capture that failed fails as well."""
    while error.__context__ is not None:
        error = error.__context__
    return " ".join(str(error).split())


def _tensors(tasks: Tasks) -> dict[str, Tensor]:
    return {name: value for name, value in vars(tasks).items() if value is not None}


def _detached(results: Any) -> Any:
    return tree_map_only(Tensor, torch.Tensor.detach, results)


def _relative_error(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest |f - e| / |e| over results, of which one may be a list of tensors. What is no
    number in both is left out; in one alone, it makes the error infinite."""
    return max((_away(f, e) for f, e in zip(found, expected, strict=True)), default=0.0)


def _away(found: Any, expected: Any) -> float:
    parts = [[each for each in tree_leaves(part) if each is not None] for part in (found, expected)]
    if not parts[1]:
        return 0.0
    f, e = (torch.cat([each.double().flatten() for each in part]) for part in parts)
    finite = e.isfinite()
    if not torch.equal(finite, f.isfinite()):
        return float("inf")
    f, e = f.where(finite, 0.0), e.where(finite, 0.0)
    return float((f - e).norm() / e.norm().clamp_min(1e-12))
