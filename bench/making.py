"""One cell, made: trained, evaluated and noted in a folder, in whatever process that is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import copy
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

import datasets
from algorithms import Algorithm
from algorithms.verification import verify
from bench import stats
from bench.checkpoints import write_tensors
from bench.distributed import ALONE, Team
from bench.environment import maker
from bench.errors import BenchError, printable
from bench.files import write_table
from bench.protocol import Kept, after_last_step, evaluate
from bench.store import CHECKPOINT, SCORES, TRAINING
from bench.sweep import MOST_LETTERS, Cell
from bench.training import Iteration, build, hyperparameters, train
from datasets import DatasetError, Source

GRADIENT_TOLERANCE = 1e-8
"""How far, relatively, an engine's gradient may be from the reference's in float64."""


STATE = "training.safetensors"
"""The checkpoint of a training, in a cell's workplace."""
SCORED = "scored.safetensors"
"""That of its test."""


class Watch(Protocol):
    """What is told how a cell gets on."""

    def training(self, cell: Cell) -> None:
        """It starts to be trained."""

    def iteration(self, progress: Iteration) -> None:
        """A meta-step is done."""

    def evaluating(self, cell: Cell) -> None:
        """It starts to be evaluated on the test split."""

    def episode(self, done: int) -> None:
        """So many test episodes are done."""


class Sources:
    """The splits that a sweep needs, each read once and put on a device once.

    Args:
        root: the folder of the data sets.
        download: fetch what is missing.
        held: splits that were read already, by dataset and split.
    """

    def __init__(
        self,
        root: Path | None,
        download: bool,
        held: Mapping[tuple[str, str], Source] | None = None,
    ) -> None:
        self.root = root
        self.download = download
        self._there: dict[tuple[str, str], dict[str, str]] = {}
        self._held = {(*name, "cpu"): source for name, source in (held or {}).items()}

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

    def data(self, cell: Cell) -> dict[str, str]:
        """What a cell's figures say of its data: ``train_data`` and ``test_data``, hashes of what
        it is trained (and validated) and tested on; neither, where samples are computed from their
        address."""
        train, val, test = (self.get(cell.dataset, split, "cpu") for split in _splits(cell))
        found = {"train_data": data_hash(train, val), "test_data": data_hash(test)}
        return {name: digest for name, digest in found.items() if digest}

    def could_have_made(self, cell: Cell, figures: Mapping[str, Any]) -> bool:
        """Whether a cell with these figures can be of the data that are there: what is not known,
        or cannot be read without fetching it, speaks against nothing."""
        place = (cell.dataset, cell.test_spec.split)
        # Noted, so that a read that fails does not fail for each of thousands of cells.
        if place not in self._there:
            here = copy(self)  # which holds what it reads for both
            here.download = False
            try:
                self._there[place] = here.data(cell)
            except (DatasetError, OSError):
                self._there[place] = {}
        return all(figures.get(name, now) == now for name, now in self._there[place].items())

    def of(self, cells: Iterable[Cell]) -> dict[tuple[str, str], Source]:
        """The splits that cells need, on the CPU, by dataset and split."""
        names = {(c.dataset, split): None for c in cells for split in _splits(c)}
        found = {name: self.get(*name, "cpu") for name in names}
        return {name: source for name, source in found.items() if source is not None}


def data_hash(*sources: Source | None) -> str | None:
    """A hash of the data of some splits; None where there are none, but samples computed from their
    address."""
    found = [source.digest for source in sources if source is not None]
    return "-".join(filter(None, found)) or None


def _splits(cell: Cell) -> tuple[str, ...]:
    return ("train", "val", cell.test_spec.split)


def train_and_evaluate(
    cell: Cell,
    workplace: Path,
    sources: Sources,
    watch: Watch,
    *,
    source: str,
    verify_gradients: bool = False,
    interrupted: Callable[[], bool] = lambda: False,
    team: Team = ALONE,
) -> dict[str, Any]:
    """Make all of a cell but its measurements.

    Args:
        cell: which.
        workplace: a folder that gets its files, and in which an interrupted training goes on.
        sources: its data.
        watch: is told how it gets on.
        source: a hash of the code.
        verify_gradients: hold the gradient after training against the reference's.
        interrupted: asked after each iteration, and after each few test episodes; True ends in
            ``KeyboardInterrupt``.
        team: the processes that train together; this one leads them.

    Returns:
        The headline figures.

    Raises:
        CellError: a loss that is not finite.
    """
    watch.training(cell)
    team.told(cell)
    data = sources.data(cell)
    train_source = sources.require(cell.dataset, "train", cell.device)
    algorithm, log = train(
        cell,
        train_source,
        sources.get(cell.dataset, "val", cell.device),
        workplace / STATE,
        source=source,
        data=data,
        report=watch.iteration,
        interrupted=interrupted,
        team=team,
    )
    write_table(workplace / TRAINING, log.frame())
    notes = {"cell": cell.id, "source": source}
    checksum = write_tensors(algorithm.state_dict(), workplace / CHECKPOINT, **notes)
    notes |= {"parameters": checksum, **data}
    test = sources.require(cell.dataset, cell.test_spec.split, cell.device)
    watch.evaluating(cell)
    scores = evaluate(
        *(algorithm, test, cell.test_spec, cell.episodes, cell.eval_steps),
        advanced=watch.episode,
        team=team,
        kept=Kept(workplace / SCORED, notes, interrupted) if team.size == 1 else None,
    )
    write_table(workplace / SCORES, scores)
    values = after_last_step(scores).to_numpy()
    interval = stats.mean_interval(values)
    figures: dict[str, Any] = {
        "metric": "accuracy" if test.outputs is None else "mse",
        "mean": interval.estimate,
        "ci95": interval.half_width,
        "train_seconds": sum(log.seconds),
        "threads": torch.get_num_threads(),
        "engine": algorithm.engine,
        **_reason(algorithm),
        "precision": algorithm.precision,
        "episode_address": cell.test_spec.address,
        **data,
        **maker(cell.device),
        "sample_reuse": test.reuse(cell.test_spec, cell.episodes),
        **_over_classes(values, test.classes_of(cell.test_spec, cell.episodes)),
    }
    if verify_gradients:
        figures["gradient_error"] = check_gradient(cell, train_source, algorithm, cell.meta_batch)
    return figures


def _reason(algorithm: Algorithm) -> dict[str, str]:
    """Why the engine is not the one that would be faster, if it is not."""
    reason = printable(algorithm.engine_reason)[:MOST_LETTERS]
    return {"engine_reason": reason} if reason else {}


def _over_classes(values: npt.ArrayLike, classes: npt.NDArray[np.int64] | None) -> dict[str, float]:
    """The interval for tasks of new classes, where the classes tell it."""
    if classes is None:
        return {}
    try:
        return {"ci95_classes": stats.class_interval(values, classes).half_width}
    except ValueError:  # every two episodes share equally many: a split of as many classes as ways
        return {}


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
        algorithm.cuda_graphs = False
        algorithm.evaluate(batch, 0)  # what it cannot do, it says here
    if algorithm.engine == "higher":
        return 0.0
    settings = hyperparameters(cell, source)
    error = verify(
        *(cell.algorithm, algorithm.model, batch, settings),
        engine=algorithm.engine,
        state=algorithm.state_dict(),
    )
    if not error < GRADIENT_TOLERANCE:
        raise BenchError(
            f"{cell.algorithm}'s gradient by the {algorithm.engine} engine is {error:.1e} from "
            "that by higher; use --engine higher"
        )
    return error
