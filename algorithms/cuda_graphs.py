"""Meta-steps as CUDA graphs: recorded once, then launched whole.

A step of a small network is hundreds to thousands of kernels, which a GPU runs in less time than
Python takes to launch them. A graph (``torch.cuda.CUDAGraph``) launches all of them by one call: on
the memory that it was recorded on, whatever Python would decide by then.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from algorithms.inner_loop import Tasks

KEPT = 4
"""Recordings that are kept at once, each with the memory of its step: a meta-batch may come in two
sizes of pass, and evaluations take turns with meta-steps."""
WARM_UP = 3
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
        places = tuple(each.data_ptr() for each in state)
        shapes = tuple(None if t is None else (t.shape, t.dtype) for t in _parts(tasks).values())
        key = (key, places, shapes)
        recording = self.kept.pop(key, None)
        if recording is None:
            while len(self.kept) >= KEPT:
                del self.kept[next(iter(self.kept))]
            recording = _Recording(function, tasks, state)
        self.kept[key] = recording  # as the last to go
        return recording.run(tasks)


class _Recording:
    def __init__(
        self, function: Callable[[Tasks], Any], tasks: Tasks, state: Sequence[Tensor]
    ) -> None:
        self.tasks = replace(tasks, **_each(torch.clone, tasks))
        try:
            self.replay, self.results = capture(
                lambda: _detached(function(self.tasks)), tasks.support_inputs.device
            )
        except RuntimeError as error:
            line = " ".join(str(error).split())
            raise RecordingError(line) from error
        self._check(function, tasks, state)

    def run(self, tasks: Tasks) -> Any:
        for name, value in _parts(tasks).items():
            if value is not None:
                getattr(self.tasks, name).copy_(value)
        self.replay()
        return self.results

    @torch.no_grad()
    def _check(
        self, function: Callable[[Tasks], Any], tasks: Tasks, state: Sequence[Tensor]
    ) -> None:
        """See that the recording computes what the function does, for other tasks and weights than
        those it was made with."""
        others = replace(
            tasks,
            support_inputs=tasks.support_inputs.roll(1, 1).roll(1, -1),
            support_targets=tasks.support_targets.flip(1),
            query_inputs=tasks.query_inputs.roll(1, 1).roll(1, -1),
            query_targets=tasks.query_targets.flip(1),
        )
        before = [each.clone() for each in state]
        device = tasks.support_inputs.device
        with torch.random.fork_rng(devices=[device.index] if device.type == "cuda" else []):
            try:
                for each in state:
                    if each.is_floating_point():
                        each.mul_(1.1)
                torch.manual_seed(0)
                with torch.enable_grad():
                    expected = _detached(function(others))
                torch.manual_seed(0)
                found = self.run(others)
            finally:
                for each, value in zip(state, before, strict=True):
                    each.copy_(value)
        error = _relative_error(found, expected)
        if not error <= TOLERANCE:
            raise RecordingError(f"what is recorded comes to other results, by {error:.0e} of them")


def capture(function: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """Record what a function launches on a GPU.

    Returns:
        What launches it again, and the function's results, which that writes anew.
    """
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries set themselves up as they are first used
            for _ in range(WARM_UP):
                function()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on loading data meanwhile.
        with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
            results = function()
    return graph.replay, results


def _parts(tasks: Tasks) -> dict[str, Tensor | None]:
    return {field.name: getattr(tasks, field.name) for field in fields(tasks)}


def _each(function: Callable[[Tensor], Tensor], tasks: Tasks) -> dict[str, Tensor]:
    parts = _parts(tasks).items()
    return {name: function(value) for name, value in parts if value is not None}


def _detached(results: Any) -> Any:
    return tree_map_only(Tensor, torch.Tensor.detach, results)


def _relative_error(found: Any, expected: Any) -> float:
    """The largest |f - e| / |e| over results."""
    pairs = zip(tree_flatten(found)[0], tree_flatten(expected)[0], strict=True)
    errors = [
        float((f - e).norm() / e.norm().clamp_min(1e-12)) for f, e in pairs if isinstance(e, Tensor)
    ]
    return max(errors, default=0.0)
