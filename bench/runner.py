"""Runs a sweep's cells: skips what is done, goes on from what is half done, reports as it goes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch

import datasets
from algorithms import AlgorithmError
from bench import measure
from bench.dispatch import dispatch, employed
from bench.distributed import ALONE, Team
from bench.environment import git_commit
from bench.errors import BenchError, CellError, SourceChangedError
from bench.executors import Crew, Job, Kit
from bench.failures import Failure, failure_of
from bench.files import write_table
from bench.making import Sources, check_gradient, train_and_evaluate
from bench.progress import Display
from bench.protocol import evaluate
from bench.reading import cell_of
from bench.signals import Interrupted, interruptible
from bench.store import PERFORMANCE, Record, Run, source_hash
from bench.sweep import Cell, Sweep
from bench.training import build, evaluated, train
from datasets import DatasetError

Costs = Literal["alone", "beside", "never"]
"""When cells are measured: with no cell trained meanwhile, while others are, or not at all."""
WORKERS = ".workers"
"""In a run's folder: what the processes that train its cells are given."""


def default_folder(cells: list[Cell]) -> Path:
    """Where a sweep's results go unless told: the same cells, the same folder, so that the same
    command goes on with the same run."""
    digest = hashlib.sha256("".join(sorted(cell.id for cell in cells)).encode()).hexdigest()
    return Path("results") / f"run-{digest[:8]}"


def left(cells: list[Cell], folder: Path) -> list[Cell]:
    """The cells that are not complete in a run's folder."""
    complete = {record.cell.id for record in Run(folder).records()}
    return [cell for cell in cells if cell.id not in complete]


def check(
    cells: list[Cell],
    sources: Sources,
    processes: int = 1,
    crew: Crew | None = None,
    costs: Costs = "alone",
) -> None:
    """Find out what cannot work before anything is written.

    Raises:
        BenchError, AlgorithmError, DatasetError: the first fault found, as one line.
    """
    if crew is not None and processes > 1:
        raise BenchError(f"torchrun and --executor {crew.name} each start processes; use one")
    if crew is None and costs == "beside":
        raise BenchError("--costs beside is for --jobs and --executor: nothing is beside here")
    for device in {cell.device for cell in cells}:
        if crew is None or not crew.afar:
            check_device(device)
    if crew is not None:
        crew.check(cells)
    for cell in {cell.seedless_id: cell for cell in cells}.values():
        if cell.meta_batch < processes:
            raise BenchError(
                f"{processes} processes cannot share a meta-batch of {cell.meta_batch} tasks; "
                f"start fewer, or give --meta-batch {processes}"
            )
        if cell.test_spec.split not in datasets.get(cell.dataset).splits:
            raise BenchError(f"--protocol {cell.protocol} is for --datasets omniglot_lake alone")
        check_training(cell, sources)
        # What an evaluation costs is measured on training data.
        measured = replace(cell.train_spec(0), shots=cell.shots)
        sources.require(cell.dataset, "train", "cpu").check(measured)
        test = sources.require(cell.dataset, cell.test_spec.split, "cpu")
        test.check(cell.test_spec)
        there = test.episodes(cell.test_spec)
        if there is not None and there < cell.episodes:
            raise BenchError(
                f"{cell.dataset} has {there} {cell.protocol} {cell.ways}-way {cell.shots}-shot "
                f"episodes with {cell.test_shots} test shots in its {cell.test_spec.split} split, "
                f"not {cell.episodes}; give --episodes {there}"
            )
    for cell in {_computed(cell): cell for cell in cells}.values():
        with tried_out(cell):
            check_gradient(cell, sources.require(cell.dataset, "train", "cpu"))


def check_training(cell: Cell, sources: Sources) -> None:
    """Find out what of a cell's training cannot work.

    Raises:
        BenchError, AlgorithmError, DatasetError: the first fault found, as one line.
    """
    training = sources.require(cell.dataset, "train", "cpu")
    if training.outputs is None and cell.ways < 2:
        raise BenchError("--ways 1 leaves nothing to choose between: give 2 or more")
    training.check(cell.train_spec(0))
    validation = sources.get(cell.dataset, "val", "cpu")
    if validation is not None:
        validation.check(cell.val_spec)
    with tried_out(cell):
        build(cell.model_copy(update={"device": "cpu"}), training)
    try:
        cell_of(cell.model_dump())
    except ValueError as error:
        raise BenchError(
            f"{cell.algorithm}: {error}; results have a column of that name"
        ) from error
    own = cell.hyperparameters
    for_gpus = {
        "precision tf32": own.get("precision") == "tf32",
        "cuda_graphs": own.get("cuda_graphs"),
    }
    for what, asked in for_gpus.items():
        if asked and not cell.device.startswith("cuda"):
            raise BenchError(f"{what} is for NVIDIA GPUs, not for {cell.device}")


@contextmanager
def tried_out(cell: Cell) -> Iterator[None]:
    """Whatever goes wrong within, in code of other hands perhaps, is one line about a cell.

    Raises:
        BenchError, AlgorithmError, DatasetError: it went wrong.
    """
    try:
        yield
    except (BenchError, AlgorithmError, DatasetError):
        raise
    except (Exception, SystemExit) as error:
        raise BenchError(f"{failure_of(error).line}, when {cell} was tried out") from error


def _computed(cell: Cell) -> tuple[Any, ...]:
    """What decides how a cell's gradient is computed: not the size of a step."""
    own = {n: v for n, v in cell.hyperparameters.items() if not isinstance(v, float)}
    return (cell.algorithm, cell.dataset, cell.ways, cell.shots, cell.model, str(own))


def check_folder(
    folder: Path, sweep: Sweep, cells: Sequence[Cell], sources: Sources, accept_changed_code: bool
) -> None:
    """Refuse to put cells beside such as do not go with them.

    Raises:
        BenchError: a folder that holds cells of other source or data.
    """
    records, source = Run(folder).records(), source_hash(sweep.plugin)
    if not accept_changed_code and any(record.source != source for record in records):
        raise BenchError(
            f"{folder} holds cells made by different source code; give another --out, or "
            "--accept-changed-code to put old and new side by side"
        )
    check_data(records, cells, sources, folder)


def check_data(
    records: Sequence[Record], cells: Sequence[Cell], sources: Sources, folder: Path
) -> None:
    """Refuse to put cells beside such as were made from other data under the same name.

    Raises:
        BenchError: a folder that holds such cells.
    """
    asked = {cell.dataset for cell in cells}
    for record in records:
        cell = record.cell
        if cell.dataset in asked and not sources.could_have_made(cell, record.figures):
            raise BenchError(
                f"{folder} holds cells made from other data than {cell.dataset}'s of now ({cell}); "
                "give another --out"
            )


def check_device(name: str) -> None:
    """Raise :class:`BenchError` for a device that is not there."""
    if not is_here(name):
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        if torch.backends.mps.is_available():
            there.append("mps")
        raise BenchError(f"there is no device {name!r}; there are {', '.join(there)}")


def is_here(name: str) -> bool:
    """Whether a device is there."""
    if name.partition(":")[0] not in ("cpu", "cuda", "mps") or name.startswith("cpu:"):
        return False
    try:
        torch.zeros(1, device=torch.device(name))
    except (RuntimeError, AssertionError, NotImplementedError):
        return False
    return True


def run(
    sweep: Sweep,
    cells: list[Cell],
    sources: Sources,
    folder: Path,
    display: Display,
    accept_changed_code: bool = False,
    team: Team = ALONE,
    *,
    crew: Crew | None = None,
    costs: Costs = "alone",
    threads: int | None = None,
    retry_failed: bool = False,
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
        crew: the processes that train one cell each; None trains them in this one.
        costs: when cells are measured.
        threads: that this one computes with; None for torch's own choice.
        retry_failed: do again what failed before; else it is skipped, too.

    Returns:
        The run's summary.

    Raises:
        BenchError: a folder that cannot be used, or that holds cells of other source or data.
    """
    store = Run(folder)
    source = source_hash(sweep.plugin)
    check_folder(folder, sweep, cells, sources, accept_changed_code)
    if threads is not None:  # also where others train: this one measures
        torch.set_num_threads(threads)
    with store.start(sweep), interruptible() as interrupted:
        store.recover(source, lambda left: sources.could_have_made(left.cell, left.figures))
        done, damaged = store.state(cells)  # asked now that no other run writes here
        work = _Work(sweep, store, source, sources, display, interrupted, team, costs)
        failed = ({cell.id for cell in cells} & store.failures().keys()) - done
        if retry_failed:
            failed = set()
        display.begin(cells, done=len(done), failed=len(failed))
        display.damaged(damaged)
        to_do = [
            [cell for cell in group if cell.id not in done | failed]
            for group in side_by_side(cells)
        ]
        groups = [group for group in to_do if group]
        try:
            if crew is None:
                for group in groups:
                    if interrupted():
                        raise KeyboardInterrupt
                    _run_group(group, work)
            else:
                _run_by(crew, groups, work)
        except KeyboardInterrupt:
            store.write_summary()
            raise
        finally:
            display.end()
        summary, swept = store.write_summary()
        from bench import plots  # half a second, which nobody has to wait for before the first cell

        plots.draw_all(summary, store.figures, swept)
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
    costs: Costs

    def failed(self, cell: Cell, failure: Failure) -> None:
        """Note that a cell failed, and say so in one line."""
        self.store.fail(cell, failure.reason, failure.diverged_at)
        self.display.failed(cell, failure.line)

    def check_source(self) -> None:
        """Raise :class:`SourceChangedError` where a process that failed may have read other source
        than the run's."""
        if source_hash(self.sweep.plugin) != self.source:
            raise SourceChangedError

    def trained_before(self, cell: Cell) -> dict[str, Any] | None:
        """The figures of a cell that has only to be measured."""
        return self.store.trained(cell, self.source, self.sources.data(cell))

    def trained(self, cell: Cell, figures: dict[str, Any]) -> dict[str, Any]:
        """Note that a cell has only to be measured."""
        figures = figures | {"commit": git_commit()}
        self.store.note_trained(cell, self.source, figures)
        return figures


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
    for cell in cells:
        try:
            trained[cell.id] = _train_here(cell, work)
        except (Exception, SystemExit) as error:
            work.failed(cell, failure_of(error))
            # The others are in the midst of the cell, and cannot go on.
            if work.team.size > 1 and not isinstance(error, CellError | BenchError):
                raise
    _complete(_measure([cell for cell in cells if cell.id in trained], work), trained, work)


def _train_here(cell: Cell, work: _Work) -> dict[str, Any]:
    """Train and evaluate a cell in this process, unless it has only to be measured."""
    before = work.trained_before(cell)
    if before is not None:
        return before
    figures = train_and_evaluate(
        cell,
        work.store.workplace(cell),
        work.sources,
        work.display,
        source=work.source,
        verify_gradients=work.sweep.verify_gradients,
        interrupted=work.interrupted,
        team=work.team,
    )
    return work.trained(cell, figures)


def _run_by(crew: Crew, groups: list[list[Cell]], work: _Work) -> None:
    """Have cells trained and evaluated by other processes, several at a time, and then measure
    them here, side by side in their groups; nothing else runs meanwhile, unless asked to."""
    trained: dict[str, dict[str, Any]] = {}
    jobs: list[Job] = []
    for cell in (cell for group in groups for cell in group):
        before = work.trained_before(cell)
        if before is None:
            jobs.append(Job(cell, work.store.place(cell), work.source, work.sweep.verify_gradients))
        else:
            trained[cell.id] = before
    sources = work.sources.of(job.cell for job in jobs)
    kit = Kit(sources, work.sweep.plugin, work.store.folder / WORKERS)
    left = {job.cell.id for job in jobs}

    def ready(group: list[Cell]) -> list[Cell]:
        return [cell for cell in group if cell.id in trained]

    with ThreadPoolExecutor(max_workers=1) as measurer, ExitStack() as at_end:
        at_end.callback(measurer.shutdown, wait=False, cancel_futures=True)
        beside: list[Future[_Measured]] = []
        with employed(crew, kit, jobs):
            for cell, outcome in dispatch(crew, jobs, work.display, work.interrupted):
                if isinstance(outcome, Failure):
                    work.check_source()
                    work.failed(cell, outcome)
                else:
                    trained[cell.id] = work.trained(cell, outcome)
                left.remove(cell.id)
                if work.costs == "alone":
                    continue
                for group in [g for g in groups if not left & {cell.id for cell in g}]:
                    groups.remove(group)
                    beside.append(measurer.submit(_measure, ready(group), work))
                while beside and beside[0].done():
                    _complete(beside.pop(0).result(), trained, work)
        for measured in beside:
            _complete(measured.result(), trained, work)
    for group in groups:
        if work.interrupted():
            raise KeyboardInterrupt
        _complete(_measure(ready(group), work), trained, work)


@dataclass(frozen=True)
class _Measured:
    """Cells that took turns in being measured, and what came of it.

    Attributes:
        performance: of each cell; None where it was not measured.
        errors: of the cells that could not be measured.
    """

    performance: list[tuple[Cell, pd.DataFrame | None]]
    errors: list[measure.MeasuringError]


def _measure(cells: Sequence[Cell], work: _Work) -> _Measured:
    """Measure cells side by side, without those with which it does not work.

    Raises:
        KeyboardInterrupt: the run is to stop.
        SourceChangedError: the code is no longer what trained them.
    """
    ready, errors = list(cells), list[measure.MeasuringError]()
    skipped = work.costs == "never"
    if ready and not skipped and not is_here(ready[0].device):
        work.display.unmeasured(ready)
        skipped = True
    if skipped:
        return _Measured([(cell, None) for cell in ready], [])
    while ready:
        work.display.measuring(ready)
        try:
            place = (work.sweep.data_root, work.sweep.plugin)
            stages = (work.display.measured, work.interrupted)
            found = measure.measure(ready, *place, work.source, *stages)
            return _Measured(list(zip(ready, found, strict=True)), errors)
        except measure.MeasuringError as error:
            if work.interrupted():  # whatever came over the process may have been meant for the run
                raise KeyboardInterrupt from error
            work.check_source()
            errors.append(error)
            ready.remove(error.cell)
    return _Measured([], errors)


def _complete(measured: _Measured, trained: Mapping[str, dict[str, Any]], work: _Work) -> None:
    """Make cells that were measured results of the run."""
    for error in measured.errors:
        work.failed(error.cell, failure_of(error))
    for cell, performance in measured.performance:
        figures = trained[cell.id]
        if performance is not None:
            write_table(work.store.workplace(cell) / PERFORMANCE, performance)
            figures = figures | measure.headline(performance)
        work.display.done(work.store.complete(cell, work.source, figures))


def follow(sources: Sources, team: Team) -> None:
    """Train and evaluate the cells that the leader names, until it has no more."""
    with interruptible(silent=True):  # the leader says when to stop
        while (cell := team.told(None)) is not None:
            mine = cell.model_copy(update={"device": team.device(cell.device)})
            train_source = sources.require(mine.dataset, "train", mine.device)
            val_source = sources.get(mine.dataset, "val", mine.device)
            test = sources.require(mine.dataset, mine.test_spec.split, mine.device)
            # What fails in a cell fails in all processes alike; the leader notes it.
            with suppress(CellError, KeyboardInterrupt):
                data = sources.data(mine)
                algorithm, _ = train(mine, train_source, val_source, None, data=data, team=team)
                settings = (mine.test_spec, mine.episodes, mine.eval_steps)
                evaluate(algorithm, test, *settings, team=team)


def estimate_seconds(
    cells: list[Cell], sources: Sources, costs: Costs = "alone"
) -> dict[str, float]:
    """Roughly how long each cell will take, by its id, from two meta-steps and a few episodes of
    each kind of cell; NaN where these diverge."""
    known: dict[str, float] = {}
    found: dict[str, float] = {}
    for cell in cells:
        if cell.seedless_id not in known:
            known[cell.seedless_id] = _estimate(cell, sources, costs)
        found[cell.id] = known[cell.seedless_id]
    return found


def _estimate(cell: Cell, sources: Sources, costs: Costs) -> float:
    if not is_here(cell.device):
        raise BenchError(f"--dry-run times a few steps, and there is no {cell.device} here")
    try:
        subject = measure.Subject(cell, sources.require(cell.dataset, "train", cell.device))
        subject.once(measure.STEP, 0)
        step = subject.once(measure.STEP, 1)["seconds"]
        subject.once(measure.EVALUATION, 0)
        episode = subject.once(measure.EVALUATION, 1)["seconds"] / measure.EPISODES
    except CellError:  # as it diverges at once, which the run will note
        return math.nan
    measuring = 0.0 if costs == "never" else measure.seconds_to_measure(step, episode)
    return float(cell.iterations * step + evaluated(cell) * episode + measuring)
