"""What a cell costs: seconds, peak memory and FLOPs, measured apart from training.

Each cell is measured in a fresh process, so that the memory is its own. The cells that will be
compared take turns (A B C, A B C, ...), so that the drift of a shared machine hits all alike and
their repeats can be paired.
"""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import resource
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

import datasets
from algorithms.kernels import Kernels
from algorithms.precision import products_in
from bench.errors import CellError, SourceChangedError
from bench.plugins import load_plugin
from bench.protocol import evaluate
from bench.signals import unsignalled
from bench.store import source_hash
from bench.sweep import Cell, stream_seed
from bench.training import build
from datasets import EpisodeLoader, Source

WARM_UP = 2
REPEATS = 7
PEAKS = 3
"""Repeats whose peak memory is measured on a CPU, apart from their times."""
EPISODES = 5
"""Evaluation episodes in one repeat."""
STEP = "meta_step"
EVALUATION = "evaluation"
CALIBRATION = "calibration"
PHASES = (STEP, CALIBRATION, EVALUATION)
GROWTH = "growth"
GROWTH_STEPS = (1, 2, 4, 8)
"""Inner steps over which the growth of a meta-step's memory is measured."""
GROWTH_TASKS = 4
CALIBRATION_SIDE = 768
CALIBRATION_PRODUCTS = 4
PATIENCE_SECONDS = 600.0
LOOK_SECONDS = 0.5
"""How often one who waits for an answer asks whether to stop: seldom, for a look takes time of the
machine that is measured."""


class Meter:
    """Clocks and memory of one device; this one is the CPU's.

    Peak memory is how far the resident set rose above its level when the meter was made, which is
    before the cell's first step. Where the system tells, pages of files (the libraries) are left
    out: it drops and reads those back as it likes, which can come to hundreds of MiB.
    """

    def __init__(self) -> None:
        self.give_back()  # what was freed before is no part of that level
        self.base = _status("RssAnon") or psutil.Process().memory_info().rss

    def give_back(self) -> None:
        """Return freed memory to the system, which a process may keep for its next step and which
        would hide that step's peak. To get it again takes time, which is not to be counted."""
        with suppress(AttributeError):  # glibc's alone
            ctypes.CDLL(None).malloc_trim(0)

    def start(self) -> None:
        """Wait until the device is idle, forget earlier peaks and start the clocks."""
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is the present level
            self.earlier = 0
        except OSError:
            self.earlier = self._highest()
        self._start_clocks()

    def stop(self) -> dict[str, Any]:
        """Wait until the device has done what it was given; what it took since the start.

        ``seconds`` is the device's own time (the CPU's is the wall clock's), ``peak_bytes`` is
        None where it was not above an earlier peak that the system does not forget.
        """
        taken = self._stop_clocks()
        peak = self._highest()
        bytes_above = max(peak - self.base, 0) if peak > self.earlier else None
        return {"seconds": taken["wall_seconds"], **taken, "peak_bytes": bytes_above}

    def _start_clocks(self) -> None:
        self.process = time.process_time()
        self.began = time.perf_counter()

    def _stop_clocks(self) -> dict[str, Any]:
        return {
            "wall_seconds": time.perf_counter() - self.began,
            "process_seconds": time.process_time() - self.process,
        }

    def _highest(self) -> int:
        # Not getrusage where /proc tells: a new process starts with its parent's peak there, and
        # resetting the peak does not reach it.
        if peak := _status("VmHWM"):
            return peak - _status("RssFile") - _status("RssShmem")
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int:
    """An amount of this process's memory as Linux tells it, in bytes; 0 where it does not."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


class AcceleratorMeter(Meter):
    """Clocks and memory of an accelerator, through torch's device-neutral layer.

    Time is that between two events on the device's stream; memory is what torch's allocator handed
    out at most, above what it had before the first step (``peak_bytes``: not the data set and the
    model, as on a CPU), and held (``reserved_bytes``); energy is NVML's counter.

    Args:
        device: the accelerator.
        layer: torch's accelerator module, or what stands in for it.
        event: makes an event that can be recorded.
        joules: reads an energy counter, None where there is none.
    """

    def __init__(
        self,
        device: torch.device,
        layer: Any = torch.accelerator,
        event: Callable[[], Any] | None = None,
        joules: Callable[[], float | None] | None = None,
    ) -> None:
        self.device = device
        self.layer = layer
        self.base = layer.memory_allocated(device)
        self.event = event or partial(torch.Event, device=device, enable_timing=True)
        self.joules = joules or partial(energy_joules, device)

    def start(self) -> None:
        self.layer.synchronize(self.device)
        self.layer.reset_peak_memory_stats(self.device)
        self.energy = self.joules()
        self.first, self.last = self.event(), self.event()
        self._start_clocks()
        self.first.record()

    def stop(self) -> dict[str, Any]:
        self.last.record()
        self.layer.synchronize(self.device)
        taken = self._stop_clocks()
        energy = self.joules()
        return {
            "seconds": self.first.elapsed_time(self.last) / 1e3,
            **taken,
            "peak_bytes": max(int(self.layer.max_memory_allocated(self.device)) - self.base, 0),
            "reserved_bytes": int(self.layer.max_memory_reserved(self.device)),
            "joules": None if energy is None or self.energy is None else energy - self.energy,
        }


def energy_joules(device: torch.device) -> float | None:
    """NVML's energy counter of a GPU since its driver was loaded; None where it does not answer."""
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
    except Exception:  # no package, no driver, no permission, a GPU too old: all mean no figure
        return None


def meter_for(device: str) -> Meter:
    """The meter of a torch device."""
    return Meter() if device == "cpu" else AcceleratorMeter(torch.device(device))


def calibrate(device: str) -> None:
    """A fixed amount of work that owes nothing to this project's code: matrix products, whose rate
    tells one machine, or one moment of it, from another, and is what a step could reach at best."""
    matrix = torch.full((CALIBRATION_SIDE, CALIBRATION_SIDE), 1 / CALIBRATION_SIDE, device=device)
    for _ in range(CALIBRATION_PRODUCTS):
        matrix = matrix @ matrix


class Subject:
    """One cell, ready to be measured in this process."""

    def __init__(self, cell: Cell, source: Source) -> None:
        self.cell = cell
        self.source = source
        self.algorithm = build(cell, source)
        seed = stream_seed("measurement", cell.seed)
        spec = cell.train_spec(seed)
        self.batches = EpisodeLoader(source, spec, cell.meta_batch)
        self.eval_spec = replace(spec, shots=cell.shots)
        self.meter = meter_for(cell.device)

    def threads(self) -> int:
        """How many torch computes with here."""
        return torch.get_num_threads()

    def once(self, phase: str, repeat: int) -> dict[str, Any]:
        """Do one repeat of a phase, and say what it took."""
        torch.manual_seed(repeat)
        self.meter.start()
        if phase == STEP:
            self.algorithm.meta_backward(self.batches[repeat])
        elif phase == EVALUATION:
            evaluate(self.algorithm, self.source, self.eval_spec, EPISODES, self.cell.eval_steps)
        else:
            with products_in(self.algorithm.precision, torch.device(self.cell.device)):
                calibrate(self.cell.device)
        taken = self.meter.stop()
        if self.algorithm.cuda_graphs and phase != CALIBRATION:
            taken["peak_bytes"] = None  # it works in memory that was handed out as it was recorded
        return {"phase": phase, "repeat": repeat, **taken}

    def peaks(self, repeat: int) -> dict[str, Any]:
        """On a CPU the peak bytes of each phase in a repeat: measured apart from its time for the
        first :data:`PEAKS`, None for the others. Empty on an accelerator, whose allocator tells
        the peak of any repeat."""
        if self.cell.device != "cpu":
            return {}
        found: dict[str, Any] = {phase: {"peak_bytes": None} for phase in PHASES}
        for phase in PHASES if repeat < PEAKS else ():
            self.meter.give_back()
            found[phase]["peak_bytes"] = self.once(phase, repeat)["peak_bytes"]
        return found

    def growth(self) -> list[dict[str, Any]]:
        """Peak memory of a meta-step by its inner steps, on few tasks, so that it fits where the
        cell itself does. Asked first: what a process once held can hide a smaller peak. Empty for
        an algorithm without inner steps, and for CUDA graphs, of which the allocator tells none."""
        if "inner_steps" not in self.cell.hyperparameters or self.algorithm.cuda_graphs:
            return []
        few = EpisodeLoader(self.source, self.batches.spec, min(self.cell.meta_batch, GROWTH_TASKS))
        usual = self.algorithm.inner_steps
        rows = []
        for steps in GROWTH_STEPS:
            self.algorithm.inner_steps = steps
            self.meter.give_back()
            self.meter.start()
            self.algorithm.meta_backward(few[0])
            row = {"phase": GROWTH, "repeat": 0, "inner_steps": steps}
            rows.append(row | self.meter.stop())
        self.algorithm.inner_steps = usual
        return rows

    def flops(self, phase: str) -> int:
        """Floating-point operations of one repeat of a phase, as torch counts them (matrix
        products and convolutions, forward and backward), those of compiled kernels included and
        as if nothing were recorded."""
        before = Kernels.flops
        recorded, self.algorithm.cuda_graphs = self.algorithm.cuda_graphs, False
        with FlopCounterMode(display=False) as counter:
            self.once(phase, 0)
        self.algorithm.cuda_graphs = recorded
        return int(counter.get_total_flops()) + Kernels.flops - before


def measure(
    cells: Sequence[Cell],
    root: Path | None = None,
    plugin: Path | None = None,
    source: str | None = None,
    told: Callable[[int, int], None] = lambda done, total: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> list[pd.DataFrame]:
    """Measure cells that are compared with one another, taking turns.

    Args:
        cells: which.
        root: the folder of the data sets.
        plugin: code to load first.
        source: the hash of the code that is to be measured; None for whatever there is.
        told: is told how many of how many parts are done.
        interrupted: asked again and again; True ends in ``KeyboardInterrupt``.

    Returns:
        For each cell one row a phase (``meta_step``, ``evaluation`` of :data:`EPISODES` episodes,
        ``calibration``) and repeat: ``phase``, ``repeat``, ``seconds``, ``wall_seconds``,
        ``process_seconds``, ``peak_bytes`` (:meth:`Subject.peaks`; None for CUDA graphs),
        ``flops``, on accelerators ``reserved_bytes`` and ``joules``, and ``session``, which is the
        same for cells that took turns. Before them one row for each of :data:`GROWTH_STEPS`
        ``inner_steps`` (``phase`` ``growth``): the peak of a meta-step with so many.

    Raises:
        MeasuringError: a process that failed; it says which cell's.
        SourceChangedError: a process that finds other code.
    """
    rows: list[list[dict[str, Any]]] = [[] for _ in cells]
    parts = itertools.count(1)
    total = len(cells) * (1 + REPEATS + len(PHASES) * (WARM_UP + REPEATS + 1))

    def ask(subject: _Asked, *question: Any) -> Any:
        answer = _ask(subject, *question, interrupted=interrupted)
        told(next(parts), total)
        return answer

    told(0, total)
    with ExitStack() as stack:
        subjects = [stack.enter_context(_subject(cell, root, plugin, source)) for cell in cells]
        peaks = []
        for subject, found in zip(subjects, rows, strict=True):
            found += ask(subject, "growth")
            peaks.append([ask(subject, "peaks", repeat) for repeat in range(REPEATS)])
        for repeat in range(-WARM_UP, REPEATS):
            for subject, found, peak in zip(subjects, rows, peaks, strict=True):
                for phase in PHASES:
                    row = ask(subject, "once", phase, repeat + WARM_UP)
                    if repeat >= 0:
                        found.append(row | {"repeat": repeat} | peak[repeat].get(phase, {}))
        for subject, found in zip(subjects, rows, strict=True):
            flops = {phase: ask(subject, "flops", phase) for phase in PHASES}
            found[:] = [row | {"flops": flops.get(row["phase"])} for row in found]
    session = secrets.token_hex(4)
    return [pd.DataFrame(found).assign(session=session) for found in rows]


def seconds_to_measure(step: float, episode: float) -> float:
    """About how long it takes to measure a cell of which a meta-step and an evaluation episode take
    so many seconds."""
    return (WARM_UP + REPEATS) * (step + EPISODES * episode)


def headline(performance: pd.DataFrame) -> dict[str, Any]:
    """The summary's columns of one cell's measurements; what was not measured is left out.

    Times and peaks are medians of the repeats, and ``_iqr`` is the interquartile range of a time.
    """
    phases = performance.groupby("phase")
    medians = phases[["seconds", "flops"]].median()
    seconds: dict[Any, float] = medians["seconds"].to_dict()
    lower, upper = (phases["seconds"].quantile(share) for share in (0.25, 0.75))
    spread: dict[Any, float] = (upper - lower).to_dict()
    flops: dict[Any, float] = medians["flops"].to_dict()
    rate = {phase: flops[phase] / seconds[phase] for phase in (STEP, CALIBRATION)}
    steps = performance[performance["phase"] == STEP]
    figures = {
        "step_ms": 1e3 * seconds[STEP],
        "step_ms_iqr": 1e3 * spread[STEP],
        "eval_ms_per_episode": 1e3 * seconds[EVALUATION] / EPISODES,
        "eval_ms_per_episode_iqr": 1e3 * spread[EVALUATION] / EPISODES,
        "step_gflops": flops[STEP] / 1e9,
        "episode_gflops": flops[EVALUATION] / EPISODES / 1e9,
        "matmul_share": rate[STEP] / rate[CALIBRATION],
        "peak_memory_bytes": steps["peak_bytes"].median(),
        "step_joules": steps["joules"].median() if "joules" in steps else None,
    }
    return {name: float(value) for name, value in figures.items() if not pd.isna(value)}


class MeasuringError(CellError):
    """A cell that could not be measured.

    Attributes:
        cell: which.
    """

    def __init__(self, cell: Cell, why: str) -> None:
        super().__init__(why)
        self.cell = cell


@dataclass(frozen=True)
class _Asked:
    """The process that answers questions about a cell."""

    cell: Cell
    connection: Connection


@contextmanager
def _subject(
    cell: Cell, root: Path | None, plugin: Path | None, source: str | None = None
) -> Iterator[_Asked]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    given = (theirs, cell, root, plugin, source, torch.get_num_threads())
    process = context.Process(target=_serve, args=given, daemon=True)
    with unsignalled():
        process.start()
    theirs.close()
    try:
        yield _Asked(cell, ours)
    except KeyboardInterrupt:  # who stops does not wait for an answer
        process.kill()
        raise
    finally:
        ours.close()
        process.join(timeout=5)
        if process.is_alive():
            process.kill()


def _serve(
    connection: Connection,
    cell: Cell,
    root: Path | None,
    plugin: Path | None,
    source: str | None,
    threads: int,
) -> None:
    """Answer questions about one cell until the other side hangs up."""
    torch.set_num_threads(threads)
    try:
        if source not in (None, source_hash(plugin)):
            connection.send(("changed", None))
            return
        load_plugin(plugin)
        train = datasets.get(cell.dataset)(root=root).load("train").to(cell.device)
        subject = Subject(cell, train)
        while True:
            name, *arguments = connection.recv()
            connection.send(("done", getattr(subject, name)(*arguments)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # it has hung up, or is no more
    except Exception as error:
        connection.send(("failed", f"{type(error).__name__}: {error}"))


def _ask(subject: _Asked, *question: Any, interrupted: Callable[[], bool] = lambda: False) -> Any:
    try:
        subject.connection.send(question)
        end = time.monotonic() + PATIENCE_SECONDS
        while not subject.connection.poll(LOOK_SECONDS):
            if interrupted():
                raise KeyboardInterrupt
            if time.monotonic() > end:
                why = f"the measuring process did not answer in {PATIENCE_SECONDS:.0f} s"
                raise MeasuringError(subject.cell, why)
        status, answer = subject.connection.recv()
    except (EOFError, BrokenPipeError, ConnectionResetError) as error:
        why = "the measuring process died; perhaps of too little memory"
        raise MeasuringError(subject.cell, why) from error
    if status == "changed":
        raise SourceChangedError
    if status == "failed":
        raise MeasuringError(subject.cell, f"measuring failed: {answer}")
    return answer
