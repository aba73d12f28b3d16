"""Runs a sweep's cells: skips what is done, goes on from what is half done, reports as it goes."""

from __future__ import annotations

import hashlib
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

import datasets
from algorithms import Algorithm
from algorithms.verification import verify
from bench import measure, plots, stats
from bench.distributed import ALONE, Team
from bench.errors import BenchError, CellError
from bench.files import write_table
from bench.progress import Display
from bench.protocol import after_last_step, evaluate
from bench.store import CHECKPOINT, PERFORMANCE, SCORES, TRAINING, Run, source_hash
from bench.sweep import Cell, Sweep
from bench.training import build, train, validation_interval, write_tensors
from datasets import Source

GRADIENT_TOLERANCE = 1e-8
"""How far, relatively, an engine's gradient may be from the reference's in float64."""


class Sources:
    """The splits that a sweep needs, each read once and put on a device once."""

    def __init__(self, root: Path | None, download: bool) -> None:
        self.root = root
        self.download = download
        self._held: dict[tuple[str, str, str], Source] = {}

    def get(self, dataset: str, split: str, device: str) -> Source | None:
        """A split on a device; None if the dataset has no such split."""
        kind = datasets.get(dataset)
        if split not in kind.splits:
            return None
        if (dataset, split, "cpu") not in self._held:
            source = kind(root=self.root, download=self.download).load(split)
            self._held[dataset, split, "cpu"] = source
        if (dataset, split, device) not in self._held:
            self._held[dataset, split, device] = self._held[dataset, split, "cpu"].to(device)
        return self._held[dataset, split, device]

    def require(self, dataset: str, split: str, device: str) -> Source:
        """A split that every dataset has."""
        source = self.get(dataset, split, device)
        if source is None:
            raise BenchError(f"{dataset} has no {split} split")
        return source


def default_folder(cells: list[Cell]) -> Path:
    """Where a sweep's results go unless told: the same cells, the same folder, so that the same
    command goes on with the same run."""
    digest = hashlib.sha256("".join(sorted(cell.id for cell in cells)).encode()).hexdigest()
    return Path("results") / f"run-{digest[:8]}"


def check(cells: list[Cell], sources: Sources, processes: int = 1) -> None:
    """Find out what cannot work before anything is written.

    Raises:
        BenchError, AlgorithmError, DatasetError: the first fault found, as one line.
    """
    for device in {cell.device for cell in cells}:
        check_device(device)
    for cell in cells:
        if cell.meta_batch < processes:
            raise BenchError(
                f"{processes} processes cannot share a meta-batch of {cell.meta_batch} tasks; "
                f"start fewer, or give --meta-batch {processes}"
            )
        if cell.test_spec.split not in datasets.get(cell.dataset).splits:
            raise BenchError(f"--protocol {cell.protocol} is for --datasets omniglot_lake alone")
        for spec in (cell.train_spec(0), cell.val_spec, cell.test_spec):
            source = sources.get(cell.dataset, spec.split, "cpu")
            if source is not None:
                source.check(spec)
        test = sources.require(cell.dataset, cell.test_spec.split, "cpu")
        there = test.episodes(cell.test_spec)
        if there is not None and there < cell.episodes:
            raise BenchError(
                f"{cell.dataset} has {there} {cell.protocol} {cell.ways}-way {cell.shots}-shot "
                f"episodes with {cell.test_shots} test shots in its {cell.test_spec.split} split, "
                f"not {cell.episodes}; give --episodes {there}"
            )
        build(
            cell.model_copy(update={"device": "cpu"}), sources.require(cell.dataset, "train", "cpu")
        )
    for cell in {_computed(cell): cell for cell in cells}.values():
        check_gradient(cell, sources.require(cell.dataset, "train", "cpu"))


def _computed(cell: Cell) -> tuple[Any, ...]:
    """What decides how a cell's gradient is computed: not the size of a step."""
    own = {n: v for n, v in cell.hyperparameters.items() if not isinstance(v, float)}
    return (cell.algorithm, cell.dataset, cell.ways, cell.shots, cell.model, str(own))


def check_gradient(
    cell: Cell, source: Source, algorithm: Algorithm | None = None, tasks: int = 2
) -> float:
    """Compare the meta-gradient of the engine that will run with the reference's, in float64.

    Args:
        cell: the settings.
        source: training data.
        algorithm: with the parameters to do it at; None for those that the training begins with.
        tasks: of the batch that decides.

    Returns:
        The relative error; 0 for the reference itself.

    Raises:
        BenchError: they differ by more than rounding.
    """
    batch = source.batch(cell.train_spec(0), range(tasks))
    if algorithm is None:
        algorithm = build(cell.model_copy(update={"device": "cpu"}), source)
        algorithm.evaluate(batch, 0)  # what it cannot do, it says here
    if algorithm.engine == "higher":
        return 0.0
    settings = cell.hyperparameters
    error = verify(cell.algorithm, algorithm.model, batch, settings, engine=algorithm.engine)
    if not error < GRADIENT_TOLERANCE:
        raise BenchError(
            f"{cell.algorithm}'s gradient by the {algorithm.engine} engine is {error:.1e} from "
            "that by higher; use --engine higher"
        )
    return error


def check_device(name: str) -> None:
    """Raise :class:`BenchError` for a device that is not there."""
    try:
        torch.zeros(1, device=torch.device(name))
    except (RuntimeError, AssertionError, NotImplementedError):
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        if torch.backends.mps.is_available():
            there.append("mps")
        raise BenchError(f"there is no device {name!r}; there are {', '.join(there)}") from None


def run(
    sweep: Sweep,
    cells: list[Cell],
    sources: Sources,
    folder: Path,
    display: Display,
    accept_changed_code: bool = False,
    team: Team = ALONE,
) -> pd.DataFrame:
    """Bring every cell of a sweep to its end.

    Args:
        sweep: what was asked, to be noted in the folder.
        cells: its cells, checked.
        sources: where their data is.
        folder: the run's folder; cells that are complete in it are skipped.
        display: is told what happens.
        accept_changed_code: put cells beside such as other source made.
        team: the processes that train together; this one leads them.

    Returns:
        The run's summary.

    Raises:
        BenchError: a folder that cannot be used, or that holds cells of other source.
    """
    store = Run(folder)
    source = source_hash(sweep.plugin)
    if not accept_changed_code and any(r.source != source for r in store.records()):
        raise BenchError(
            f"{folder} holds cells made by different source code; give another --out, or "
            "--accept-changed-code to put old and new side by side"
        )
    with store.start(sweep), interruptible() as interrupted:
        store.recover(source)
        done, damaged = store.state(cells)  # asked now that no other run writes here
        work = _Work(sweep, store, source, sources, display, interrupted, team)
        display.begin(cells, done=len(done))
        display.damaged(damaged)
        try:
            for group in side_by_side(cells):
                _run_group([cell for cell in group if cell.id not in done], work)
        finally:
            display.end()
        summary = store.write_summary()
        plots.draw_all(summary, store.figures, store.swept())
    return summary


@dataclass(frozen=True)
class _Work:
    """What all cells of a run are made with."""

    sweep: Sweep
    store: Run
    source: str
    sources: Sources
    display: Display
    interrupted: Interrupted
    team: Team

    def failed(self, cell: Cell, line: str, reason: str = "") -> None:
        """Note that a cell failed, and say so in one line."""
        self.store.fail(cell, reason or line)
        self.display.failed(cell, line)


def side_by_side(cells: Sequence[Cell]) -> Iterator[list[Cell]]:
    """The cells in the groups that are measured in turns: of one setting, and each algorithm once,
    so that a sweep of a hyperparameter does not multiply the processes that are held at a time."""
    group: list[Cell] = []
    for cell in cells:
        if group and (
            cell.setting != group[0].setting or cell.algorithm in {c.algorithm for c in group}
        ):
            yield group
            group = []
        group.append(cell)
    if group:
        yield group


def _run_group(cells: list[Cell], work: _Work) -> None:
    """Train and evaluate cells that are compared, then measure them side by side."""
    trained: dict[str, dict[str, Any]] = {}
    ready: list[Cell] = []
    for cell in cells:
        with _failures_noted(cell, work):
            trained[cell.id] = _train_and_evaluate(cell, work)
            ready.append(cell)
    if not ready:
        return
    work.display.measuring(ready)
    try:
        measured = measure.measure(ready, work.sweep.data_root, work.sweep.plugin)
    except CellError as error:
        for cell in ready:
            work.failed(cell, str(error))
        return
    for cell, performance in zip(ready, measured, strict=True):
        write_table(work.store.workplace(cell) / PERFORMANCE, performance)
        figures = trained[cell.id] | measure.headline(performance)
        work.display.done(work.store.complete(cell, work.source, figures))
    if work.interrupted():
        raise KeyboardInterrupt


def _train_and_evaluate(cell: Cell, work: _Work) -> dict[str, Any]:
    """Make all of a cell but its measurements, in its workplace; returns its figures."""
    source, sources, team = work.source, work.sources, work.team
    workplace = work.store.workplace(cell)
    before = work.store.trained(cell, source)
    if before is not None:
        return before
    work.display.training(cell)
    team.told(cell)
    train_source = sources.require(cell.dataset, "train", cell.device)
    algorithm, log = train(
        cell,
        train_source,
        sources.get(cell.dataset, "val", cell.device),
        workplace / "training.safetensors",
        source=source,
        report=work.display.iteration,
        interrupted=work.interrupted,
        team=team,
    )
    write_table(workplace / TRAINING, log.frame())
    write_tensors(algorithm.state_dict(), workplace / CHECKPOINT, cell=cell.id, source=source)
    test = sources.require(cell.dataset, cell.test_spec.split, cell.device)
    work.display.evaluating(cell)
    scores = evaluate(
        *(algorithm, test, cell.test_spec, cell.episodes, cell.eval_steps),
        advanced=work.display.episode,
        team=team,
    )
    write_table(workplace / SCORES, scores)
    values = after_last_step(scores).to_numpy()
    interval = stats.mean_interval(values)
    figures: dict[str, Any] = {
        "metric": "accuracy" if test.outputs is None else "mse",
        "mean": interval.estimate,
        "ci95": interval.half_width,
        "train_seconds": sum(log.seconds),
        "engine": algorithm.engine,
        "episode_address": cell.test_spec.address,
        "sample_reuse": test.reuse(cell.test_spec, cell.episodes),
        **_over_classes(values, test.classes_of(cell.test_spec, cell.episodes)),
    }
    if work.sweep.verify_gradients:
        figures["gradient_error"] = check_gradient(cell, train_source, algorithm, cell.meta_batch)
    work.store.note_trained(cell, source, figures)
    return figures


def _over_classes(values: npt.ArrayLike, classes: npt.NDArray[np.int64] | None) -> dict[str, float]:
    """The interval for tasks of new classes, where the classes tell it."""
    if classes is None:
        return {}
    try:
        return {"ci95_classes": stats.class_interval(values, classes).half_width}
    except ValueError:  # every two episodes share equally many: a split of as many classes as ways
        return {}


def follow(sources: Sources, team: Team) -> None:
    """Train and evaluate the cells that the leader names, until it has no more."""
    with interruptible():  # the leader says when to stop
        while (cell := team.told(None)) is not None:
            mine = cell.model_copy(update={"device": team.device(cell.device)})
            train_source = sources.require(mine.dataset, "train", mine.device)
            val_source = sources.get(mine.dataset, "val", mine.device)
            test = sources.require(mine.dataset, mine.test_spec.split, mine.device)
            # What fails in a cell fails in all processes alike; the leader notes it.
            with suppress(CellError, KeyboardInterrupt):
                algorithm, _ = train(mine, train_source, val_source, None, team=team)
                settings = (mine.test_spec, mine.episodes, mine.eval_steps)
                evaluate(algorithm, test, *settings, team=team)


@contextmanager
def _failures_noted(cell: Cell, work: _Work) -> Iterator[None]:
    """Record what goes wrong in a cell, so that the others can go on."""
    try:
        yield
    except (CellError, BenchError) as error:
        work.failed(cell, str(error))
    except (RuntimeError, MemoryError) as error:
        work.failed(
            cell, f"{type(error).__name__}: {error}".splitlines()[0], traceback.format_exc()
        )
        if work.team.size > 1:  # the others are in the midst of the cell, and cannot go on
            raise


class Interrupted:
    """Whether Ctrl-C or a termination was asked for; work stops at the next safe point."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        return self.asked


@contextmanager
def interruptible() -> Iterator[Interrupted]:
    """Turn the first Ctrl-C (or SIGTERM) into a question that the work asks itself; a second one
    stops at once."""
    interrupted = Interrupted()

    def note(number: int, frame: FrameType | None) -> None:
        if interrupted.asked:
            raise KeyboardInterrupt
        interrupted.asked = True

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def estimate_seconds(cells: list[Cell], sources: Sources) -> dict[str, float]:
    """Roughly how long each cell will take, by its id, from two meta-steps and a few episodes of
    each kind of cell."""
    known: dict[str, float] = {}
    found: dict[str, float] = {}
    for cell in cells:
        if cell.seedless_id not in known:
            known[cell.seedless_id] = _estimate(cell, sources)
        found[cell.id] = known[cell.seedless_id]
    return found


def _estimate(cell: Cell, sources: Sources) -> float:
    subject = measure.Subject(cell, sources.require(cell.dataset, "train", cell.device))
    subject.once(measure.STEP, 0)
    step = subject.once(measure.STEP, 1)["seconds"]
    subject.once(measure.EVALUATION, 0)
    episode = subject.once(measure.EVALUATION, 1)["seconds"] / measure.EPISODES
    validations = cell.iterations // validation_interval(cell)
    episodes = cell.episodes + validations * cell.val_episodes
    turns = measure.WARM_UP + measure.REPEATS
    measuring = turns * (step + measure.EPISODES * episode)
    return float(cell.iterations * step + episodes * episode + measuring)
