"""The meta-training loop of one cell: the same for every algorithm, and resumable to the bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
import torch
from torch import nn

import algorithms
from algorithms import Algorithm, models
from bench.checkpoints import State, due, read_tensors, write_tensors
from bench.distributed import ALONE, Team
from bench.errors import CellError, DivergedError
from bench.protocol import after_last_step, evaluate
from bench.sweep import Cell, stream_seed
from datasets import EpisodeLoader, Source


@dataclass
class Iteration:
    """What a training tells whoever watches, after each iteration; ``seconds`` are those of the
    meta-steps since it last told."""

    iteration: int
    loss: float
    metric: float
    seconds: float
    validation: float | None = None


@dataclass
class Log:
    """What happened in each iteration so far, and in each validation."""

    loss: list[float] = field(default_factory=list)
    metric: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    val_iteration: list[int] = field(default_factory=list)
    val_metric: list[float] = field(default_factory=list)

    def frame(self) -> pd.DataFrame:
        """Columns ``iteration`` (from 1), ``loss``, ``metric``, ``seconds`` and, where there was a
        validation after the iteration, ``val_metric``."""
        frame = pd.DataFrame(
            {"loss": self.loss, "metric": self.metric, "seconds": self.seconds},
            index=pd.RangeIndex(1, len(self.loss) + 1, name="iteration"),
        )
        frame["val_metric"] = pd.Series(self.val_metric, index=self.val_iteration, dtype="float64")
        return frame.reset_index()


def build(cell: Cell, source: Source) -> Algorithm:
    """The cell's algorithm over its model, as they are before training."""
    outputs = source.outputs or cell.ways
    model_name = cell.model or models.usual(source.sample_shape)
    seed = stream_seed("initialisation", cell.seed)
    model = models.build(model_name, source.sample_shape, outputs, seed).to(cell.device)
    with models.drawing(stream_seed("initialisation beside the model", cell.seed)):
        return algorithms.create(cell.algorithm, model, **hyperparameters(cell, source))


def hyperparameters(cell: Cell, source: Source) -> dict[str, Any]:
    """The algorithm's own of a cell; the classes to train on, if left open, are the source's."""
    own = cell.hyperparameters
    if "train_classes" in own and own["train_classes"] is None:
        return own | {"train_classes": source.class_count()}
    return own


def train(
    cell: Cell,
    train_source: Source,
    val_source: Source | None,
    checkpoint: Path | None,
    *,
    source: str = "",
    data: Mapping[str, str] = MappingProxyType({}),
    report: Callable[[Iteration], None] = lambda progress: None,
    interrupted: Callable[[], bool] = lambda: False,
    team: Team = ALONE,
) -> tuple[Algorithm, Log]:
    """Meta-train, from the checkpoint if there is one.

    Args:
        cell: what to train.
        train_source: the training split.
        val_source: the validation split, which picks the parameters that are kept; without one
            they are the last. The test split is nowhere in here.
        checkpoint: written now and then, and when interrupted; a process that follows has none.
        source: a hash of the code; a checkpoint made by other code is not gone on from.
        data: hashes of the data by name, of which the same holds.
        report: is told of each iteration; of those before the checkpoint, only of validations and
            of the last.
        interrupted: asked after each iteration; True ends in ``KeyboardInterrupt``.
        team: the processes that train together, each of which calls this; the leader's checkpoint
            and its answer to ``interrupted`` hold for all.

    Returns:
        The algorithm with the parameters that are kept, and the log.

    Raises:
        DivergedError: a loss, in training or validation, that is not finite.
        CellError: processes of a team that have other data than one another.
    """
    notes = {"cell": cell.id, "source": source, **data}
    if not team.agrees("".join(data.values())):
        raise CellError("the processes have other data than one another")
    run = _Training(cell, build(cell, train_source), notes, team)
    if checkpoint is not None:
        run.restore(checkpoint)
    if team.size > 1:
        run.load(team.told(run.tensors()))
    spec = cell.train_spec(stream_seed("training episodes", cell.seed))
    batches = EpisodeLoader(train_source, spec, cell.meta_batch)
    every = validation_interval(cell)
    saved = time.monotonic()
    for progress in run.past():
        report(progress)
    for iteration in range(len(run.log.loss), cell.iterations):
        progress = run.step(batches, iteration)
        if val_source is not None and (
            (iteration + 1) % every == 0 or iteration + 1 == cell.iterations
        ):
            progress.validation = run.validate(val_source, iteration)
        report(progress)
        stop = team.told(interrupted())
        if checkpoint is not None and (stop or due(saved)):
            run.save(checkpoint)
            saved = time.monotonic()
        if stop:
            raise KeyboardInterrupt
    if checkpoint is not None:
        run.save(checkpoint)
    if run.best:
        run.algorithm.load_state_dict(run.best)
    return run.algorithm, run.log


def _seed(seed: int, device: str) -> None:
    """Seed the generators that a training on this device draws from.

    ``torch.manual_seed`` seeds those of every other kind of device too, and where it finds none it
    notes the calling stack in case there will be one: a sixth of a small network's meta-step.
    """
    if device == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


class _Training:
    """The state of a training: all that a checkpoint holds."""

    def __init__(self, cell: Cell, algorithm: Algorithm, notes: dict[str, str], team: Team) -> None:
        self.cell = cell
        self.team = team
        self.notes = notes
        self.algorithm = algorithm
        self.log = Log()
        self.best: State = {}
        kinds = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
        # A group, since a list may not be empty, and nothing may be there to learn.
        learned = [{"params": algorithm.parameters()}]
        self.optimizer = kinds[cell.meta_optimizer](learned, lr=cell.meta_lr)

    def step(self, batches: EpisodeLoader, iteration: int) -> Iteration:
        """One meta-step: the outer optimizer on the meta-gradient of one batch."""
        cell, team = self.cell, self.team
        # What an algorithm draws itself is a function of the iteration, so that a training that was
        # interrupted draws the same. Mini-batches are one of the task, too; noise such as dropout's
        # is drawn by each process for its own tasks.
        member = (team.rank,) if team.rank else ()
        _seed(stream_seed("meta-step", cell.seed, iteration, *member), cell.device)
        began = time.perf_counter()
        self.algorithm.progress = iteration / cell.iterations
        first = iteration * cell.meta_batch
        mine = team.part(range(first, first + cell.meta_batch))
        if self.algorithm.inner_batch is not None:
            seeds = [stream_seed("mini-batches", cell.seed, episode) for episode in mine]
            self.algorithm.task_seeds = seeds
        scores = self.algorithm.meta_backward(batches.source.batch(batches.spec, mine))
        share = len(mine) / cell.meta_batch
        team.average(self.algorithm, share)
        if cell.meta_clip is not None:
            nn.utils.clip_grad_value_(self.algorithm.parameters(), cell.meta_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = meta_lr(cell, iteration)
        self.optimizer.step()
        loss, metric = (float(team.joined(part).mean()) for part in (scores.loss, scores.metric))
        self.log.loss.append(loss)
        self.log.metric.append(metric)
        self.log.seconds.append(time.perf_counter() - began)
        if not abs(loss) < float("inf"):
            raise DivergedError(f"the loss is {loss}", iteration + 1)
        return Iteration(iteration + 1, loss, metric, self.log.seconds[-1])

    def past(self) -> Iterator[Iteration]:
        """What is to be told of the iterations that are in the log."""
        log, told = self.log, 0
        validated = dict(zip(log.val_iteration, log.val_metric, strict=True))
        for count in sorted({*validated, len(log.loss)} - {0}):
            own = slice(told, count)
            told = count
            loss, metric = log.loss[count - 1], log.metric[count - 1]
            yield Iteration(count, loss, metric, sum(log.seconds[own]), validated.get(count))

    def validate(self, source: Source, iteration: int) -> float:
        """Score on validation episodes, and keep the parameters if they are the best so far."""
        cell = self.cell
        settings = (cell.val_spec, cell.val_episodes, cell.eval_steps)
        try:
            scores = evaluate(self.algorithm, source, *settings, team=self.team)
        except CellError as error:
            raise DivergedError(f"in validation, {error},", iteration + 1) from error
        metric = float(after_last_step(scores).mean())
        better = max if source.outputs is None else min
        if not self.log.val_metric or better(metric, *self.log.val_metric) == metric:
            self.best = {n: v.clone() for n, v in self.algorithm.state_dict().items()}
        self.log.val_iteration.append(iteration + 1)
        self.log.val_metric.append(metric)
        return metric

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        write_tensors(self.tensors(), path, **self.notes)

    def tensors(self) -> State:
        """All of the state, on the CPU."""
        tensors: State = {}
        for name, value in self.algorithm.state_dict().items():
            tensors[f"model/{name}"] = value
        for name, value in self.best.items():
            tensors[f"best/{name}"] = value
        for index, state in self.optimizer.state_dict()["state"].items():
            for name, value in state.items():
                tensors[f"optimizer/{index}/{name}"] = torch.as_tensor(value)
        for name, values in vars(self.log).items():
            tensors[f"log/{name}"] = torch.tensor(values, dtype=torch.float64)
        return {name: value.detach().cpu() for name, value in tensors.items()}

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint; one that cannot be read counts as none."""
        try:
            tensors = read_tensors(path, **self.notes)
        except (OSError, ValueError):
            return
        self.load(tensors)

    def load(self, tensors: State) -> None:
        """Take up a state."""
        parts: dict[str, State] = {"model": {}, "best": {}, "optimizer": {}, "log": {}}
        for key, value in tensors.items():
            part, name = key.split("/", 1)
            parts[part][name] = value
        self.algorithm.load_state_dict(parts["model"])
        self.best = {n: v.to(self.cell.device) for n, v in parts["best"].items()}
        states: dict[int, State] = {}
        for key, value in parts["optimizer"].items():
            index, name = key.split("/", 1)
            states.setdefault(int(index), {})[name] = value
        whole = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": states, "param_groups": whole["param_groups"]})
        log: dict[str, Any] = {name: value.tolist() for name, value in parts["log"].items()}
        log["val_iteration"] = [int(i) for i in log["val_iteration"]]
        self.log = Log(**log)


def validation_interval(cell: Cell) -> int:
    """Iterations between validations: four a training, unless told otherwise."""
    return cell.val_every or max(1, cell.iterations // 4)


def evaluated(cell: Cell) -> int:
    """How many episodes a cell is evaluated on, those of its validations included."""
    return cell.episodes + validations(cell) * cell.val_episodes


def validations(cell: Cell) -> int:
    """How many a training has, the one at its end among them."""
    return -(-cell.iterations // validation_interval(cell))


def meta_lr(cell: Cell, iteration: int) -> float:
    """The outer step size at an iteration (from 0) of the cell's schedule."""
    done = iteration / cell.iterations
    if cell.meta_schedule == "linear":
        return cell.meta_lr * (1 - done)
    if cell.meta_schedule == "cosine":
        return cell.meta_lr * 0.5 * (1 + float(torch.cos(torch.tensor(done * torch.pi))))
    return cell.meta_lr
