"""A search for hyperparameters: Optuna proposes, validation episodes decide, and the test split is
never read.

Data flows one way: records of trials on disk -> Optuna's study -> the next trial. A study is made
again from its records, and each proposal has a seed of its own, so that a search which was
interrupted goes on as if it had not been.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import filelock
import pandas as pd
import tomli_w
from pydantic import ConfigDict, TypeAdapter

from bench.errors import BenchError
from bench.failures import failure_of
from bench.files import write_table, write_text
from bench.making import Sources, check_gradient, data_hash
from bench.naming import said
from bench.reading import read_json
from bench.runner import check_device, check_training, tried_out
from bench.signals import interruptible
from bench.store import source_hash, to_json
from bench.sweep import Cell, Sweep, literal, stream_seed, value_of
from bench.training import Iteration, train

try:
    import optuna
    from optuna.distributions import (
        BaseDistribution,
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )
    from optuna.trial import FrozenTrial, TrialState, create_trial
except ImportError as error:
    raise BenchError("a search needs optuna: pip install 'fewshot-bench[search]'") from error

YARDSTICK = ("eval_seed", "val_episodes", "val_every", "episodes", "protocol", "test_shots")
"""Settings by which trials would be judged unlike one another."""
STARTUP = 5
"""Trials before the first is pruned, against the median of those that are complete."""

Space = dict[str, BaseDistribution]


@dataclass(frozen=True)
class Range:
    """What ``--space`` says of a name: the two ends of an interval, or choices."""

    values: list[Any]
    kind: Literal["linear", "log", "choice"]


@dataclass
class Trial:
    """What came of one proposal: all that ``trials/<algorithm>-<trial>.json`` holds.

    Attributes:
        state: ``pruned`` trials were worse than the median at a validation, ``diverged`` ones came
            to no finite loss, ``failed`` ones raised what ``reason`` says.
        value: the best validation score; None where there was none.
        validations: the score at each validation, by iteration.
        iterations, samples, gradients, val_episodes: what the trial cost.
        seconds: of its meta-steps.
    """

    __pydantic_config__: ClassVar = ConfigDict(allow_inf_nan=False, extra="forbid")

    algorithm: str
    trial: int
    source: str
    parameters: dict[str, Any]
    state: Literal["complete", "pruned", "diverged", "failed"] = "complete"
    value: float | None = None
    iterations: int = 0
    samples: int = 0
    gradients: int = 0
    val_episodes: int = 0
    seconds: float = 0.0
    validations: dict[int, float] = field(default_factory=dict)
    reason: str = ""

    def __str__(self) -> str:
        chosen = ", ".join(f"{name} {said(value)}" for name, value in self.parameters.items())
        score = "" if self.value is None else f" {self.value:.4f}"
        why = f": {self.reason}" if self.state == "failed" else ""
        return (
            f"{self.algorithm} trial {self.trial}: {self.state}{score} after {self.iterations} "
            f"iterations ({chosen}){why}"
        )


@dataclass(frozen=True)
class Search:
    """What is searched, checked: for each algorithm a cell to start from and its space.

    Attributes:
        text: the space as it was asked for.
        cells: by algorithm, the cell with everything that is not searched.
        spaces: by algorithm, the distributions of what is.
        higher: whether a higher score is the better one.
        data: a hash of what is trained and validated on, None for what is computed.
    """

    sweep: Sweep
    text: str
    cells: dict[str, Cell]
    spaces: dict[str, Space]
    higher: bool
    data: str | None

    def cell(self, algorithm: str, parameters: dict[str, Any]) -> Cell:
        """The cell of some values of the space."""
        (cell,) = self.chosen(algorithm, parameters).cells()
        return cell

    def chosen(self, algorithm: str, parameters: dict[str, Any]) -> Sweep:
        """The sweep that asks for some values of the space."""
        values = {name: [value] for name, value in parameters.items()}
        return self.sweep.model_copy(
            update={"algos": [algorithm], "set": {**self.sweep.set, **values}}
        )

    @property
    def asked(self) -> str:
        """What decides every trial, as TOML."""
        sweep = self.sweep.model_dump(mode="json", exclude_none=True)
        of = {"data": self.data} if self.data else {}
        return tomli_w.dumps({"space": self.text, **of, **sweep})

    @property
    def default_folder(self) -> Path:
        """The same search, the same folder, so that the same command goes on with it."""
        return Path("results") / f"search-{hashlib.sha256(self.asked.encode()).hexdigest()[:8]}"


def prepare(sweep: Sweep, space: str, sources: Sources) -> Search:
    """Check a search before anything is written.

    Args:
        sweep: what is held fixed: one value of every axis but the algorithms.
        space: ``inner_lr=0.01:1:log,inner_steps=1:5,norm=support|single``: an interval (of whole
            numbers where the setting takes no others) or choices.
        sources: where the data is; its test split is not read.

    Raises:
        BenchError, AlgorithmError, DatasetError: what cannot be searched.
    """
    ranges = _parsed(space)
    for name in ranges:
        if name in sweep.set:
            raise BenchError(f"{name} is given twice: to be searched, and with a value")
        if name in YARDSTICK:
            raise BenchError(f"{name} is what trials are judged by, and cannot be searched")
    # Which names there are, and which values can be, is for the cells to say.
    ends = {name: found.values for name, found in ranges.items()}
    sweep.model_copy(update={"set": {**sweep.set, **ends}}).cells()
    cells: dict[str, Cell] = {}
    spaces: dict[str, Space] = {}
    for algorithm in sweep.algos:
        fixed = sweep.model_copy(update={"algos": [algorithm]}).cells()
        if len(fixed) > 1:
            raise BenchError(f"a search holds all but its space fixed; this has {len(fixed)} cells")
        (cells[algorithm],) = fixed
        known = cells[algorithm].row()
        spaces[algorithm] = {
            name: _distribution(algorithm, name, found)
            for name, found in ranges.items()
            if name in known
        }
        if not spaces[algorithm]:
            raise BenchError(f"{algorithm} has nothing of the space {space!r}")
    dataset = next(iter(cells.values())).dataset
    training = sources.require(dataset, "train", "cpu")
    validation = sources.get(dataset, "val", "cpu")
    if validation is None:
        raise BenchError(f"{dataset} has no validation split for a search to decide by")
    higher, data = training.outputs is None, data_hash(training, validation)
    search = Search(sweep, space, cells, spaces, higher, data)
    for algorithm, cell in cells.items():
        check_device(cell.device)
        check_training(cell, sources)
        for place in (0, -1):
            corner = {name: ranges[name].values[place] for name in spaces[algorithm]}
            check_training(search.cell(algorithm, corner), sources)
        with tried_out(cell):
            check_gradient(cell, training)
    return search


def _parsed(text: str) -> dict[str, Range]:
    """The space as it stands on the command line."""
    found: dict[str, Range] = {}
    for part in text.split(","):
        name, sign, values = (piece.strip() for piece in part.partition("="))
        name = name.replace("-", "_")
        if name in found:
            raise BenchError(f"--space: {name} is given twice")
        choices = values.split("|")
        ends = values.split(":")
        if sign and name and len(choices) > 1 and all(choices):
            found[name] = Range([literal(choice) for choice in choices], "choice")
            continue
        numbers = [literal(end) for end in ends[:2]]
        if (
            not (sign and name and len(ends) in (2, 3) and ends[2:] in ([], ["log"]))
            or not all(isinstance(n, int | float) for n in numbers)
            or not numbers[0] < numbers[1]
            or (ends[2:] and numbers[0] <= 0)
        ):
            raise BenchError(
                f"--space: {part!r} is not NAME=LOW:HIGH, NAME=LOW:HIGH:log (above 0) or NAME=A|B"
            )
        found[name] = Range(numbers, "log" if ends[2:] else "linear")
    return found


def _distribution(algorithm: str, name: str, asked: Range) -> BaseDistribution:
    values = [value_of(algorithm, name, value) for value in asked.values]
    if asked.kind == "choice":
        return CategoricalDistribution(values)
    low, high = values
    log = asked.kind == "log"
    try:
        value_of(algorithm, name, low + 0.5)
    except BenchError:
        return IntDistribution(low, high, log=log)
    return FloatDistribution(low, high, log=log)


def run(
    search: Search,
    trials: int,
    sources: Sources,
    folder: Path,
    done: Callable[[Trial], None] = lambda trial: None,
) -> list[tuple[Path, Trial]]:
    """Bring so many trials of each algorithm to their end, and write down what they came to.

    Args:
        search: what :func:`prepare` made.
        trials: how many of each algorithm; those whose record is in the folder are not run again.
        sources: where the data is.
        folder: gets ``search.toml``, ``trials/``, ``trials.parquet`` and ``.csv`` and, for each
            algorithm with a complete trial, ``best-<algorithm>.toml``, for ``run --config``.
        done: is told of each trial.

    Returns:
        The files of best settings, and the trials that they are of.

    Raises:
        BenchError: a folder that cannot be used, or that holds another search.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    source = source_hash(search.sweep.plugin)
    with _opened(folder, search.asked), interruptible() as interrupted:
        found: list[Trial] = []
        for algorithm in search.cells:
            study = _Study(search, algorithm, sources)
            for number in range(trials):
                record = folder / "trials" / f"{algorithm}-{number:04}.json"
                known = study.known(record, number)
                if known is not None and known.source != source:
                    raise BenchError(f"{folder} holds trials made by different source code")
                state = record.with_suffix(".state")
                trial = known or study.new(number, source, state, interrupted)
                if known is None:
                    write_text(record, to_json(asdict(trial)))
                state.unlink(missing_ok=True)
                study.trials.append(trial)
                done(trial)
                found.append(trial)
                _write_table(found, folder)
        return [best for a in search.cells if (best := _write_best(search, a, found, folder))]


_WRITTEN = TypeAdapter(Trial)


def _told(trial: Trial, space: Space) -> FrozenTrial:
    """A trial as Optuna is told of it. What diverged counts as pruned, before its first validation:
    to Optuna the worst that there is.

    Raises:
        ValueError: it is not of this space.
    """
    complete = trial.state == "complete"
    return create_trial(
        state=TrialState.COMPLETE if complete else TrialState.PRUNED,
        value=trial.value if complete else None,
        params=trial.parameters,
        distributions=space,
        intermediate_values=trial.validations,
    )


class _Study:
    """Optuna's study of one algorithm, made anew from its trials for each proposal: what a trial
    came to is told in one way, whether it has just been run or was read.

    Attributes:
        trials: those there are, in their order.
    """

    def __init__(self, search: Search, algorithm: str, sources: Sources) -> None:
        self.search = search
        self.algorithm = algorithm
        cell = search.cells[algorithm]
        self.train = sources.require(cell.dataset, "train", cell.device)
        self.val = sources.require(cell.dataset, "val", cell.device)
        self.trials: list[Trial] = []

    def proposal(self, number: int) -> optuna.Trial:
        """What Optuna proposes after the trials so far."""
        space = self.search.spaces[self.algorithm]
        seed = stream_seed("search", self.search.cells[self.algorithm].seed, number) % 2**32
        study = optuna.create_study(
            direction="maximize" if self.search.higher else "minimize",
            sampler=optuna.samplers.TPESampler(seed=seed),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP),
        )
        for trial in self.trials:
            study.add_trial(_told(trial, space))
        return study.ask(space)

    def known(self, record: Path, number: int) -> Trial | None:
        """A trial's record; one that cannot be read, or is not of this search, counts as none."""
        try:
            trial = _WRITTEN.validate_python(read_json(record))
            _told(trial, self.search.spaces[self.algorithm])
        except (OSError, ValueError):
            return None
        return trial if (trial.algorithm, trial.trial) == (self.algorithm, number) else None

    def new(self, number: int, source: str, state: Path, interrupted: Callable[[], bool]) -> Trial:
        """Run a trial of what Optuna proposes, from its checkpoint ``state`` if there is one."""
        proposed = self.proposal(number)
        trial = Trial(self.algorithm, number, source, dict(proposed.params))
        cell = self.search.cell(self.algorithm, trial.parameters)

        def report(progress: Iteration) -> None:
            trial.iterations = progress.iteration
            trial.seconds += progress.seconds
            if progress.validation is None:
                return
            trial.validations[progress.iteration] = progress.validation
            trial.val_episodes += cell.val_episodes
            proposed.report(progress.validation, progress.iteration)
            if progress.iteration < cell.iterations and proposed.should_prune():
                raise optuna.TrialPruned

        try:
            train(
                *(cell, self.train, self.val, state),
                source=source,
                report=report,
                interrupted=interrupted,
            )
        except optuna.TrialPruned:
            trial.state = "pruned"
        except (Exception, SystemExit) as error:
            failure = failure_of(error)
            trial.state, trial.reason = "failed", failure.line
            if failure.diverged_at is not None:
                trial.state, trial.iterations = "diverged", failure.diverged_at
            trial.validations = {}  # that it went well at first is nothing to learn from
        trial.samples = trial.iterations * cell.samples_per_step
        trial.gradients = trial.iterations * cell.gradients_per_step
        best = max if self.search.higher else min
        trial.value = best(trial.validations.values(), default=None)
        return trial


def _opened(folder: Path, asked: str) -> filelock.BaseFileLock:
    """Make the folder, or find it to be of the same search, and keep others out."""
    noted = folder / "search.toml"
    try:
        (folder / "trials").mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock", timeout=0)
        lock.acquire()
        if noted.exists() and noted.read_text(encoding="utf-8") != asked:
            lock.release()
            raise BenchError(f"{folder} holds another search; give another --out")
        write_text(noted, asked)
    except filelock.Timeout as error:
        raise BenchError(f"{folder} is in use by another search") from error
    except OSError as error:
        raise BenchError(f"cannot write to {folder}: {error.strerror}") from error
    return lock


def _write_table(trials: list[Trial], folder: Path) -> None:
    rows = [asdict(trial) for trial in trials]
    own = [row.pop("parameters") for row in rows]
    frame = pd.DataFrame(rows).drop(columns=["source", "validations"])
    # A trial that was pruned has other iterations than were proposed.
    proposed = pd.DataFrame(own).rename(columns=lambda n: f"{n}_proposed" if n in frame else n)
    table = pd.concat([frame, proposed], axis=1)
    write_text(folder / "trials.csv", table.to_csv(index=False))
    write_table(folder / "trials.parquet", table)


def _write_best(
    search: Search, algorithm: str, found: list[Trial], folder: Path
) -> tuple[Path, Trial] | None:
    """The best settings as a sweep, under what it took to find them."""
    trials = [trial for trial in found if trial.algorithm == algorithm]
    scored = [(t.value, t) for t in trials if t.state == "complete" and t.value is not None]
    if not scored:
        return None
    choose = max if search.higher else min
    value, best = choose(scored, key=lambda pair: pair[0])
    metric = "accuracy" if search.higher else "mse"
    states = [trial.state for trial in trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    costs = ", ".join(
        f"{sum(getattr(trial, name) for trial in trials):,} {noun}"
        for name, noun in (
            ("iterations", "iterations"),
            ("samples", "samples"),
            ("gradients", "gradients"),
            ("val_episodes", "validation episodes"),
        )
    )
    note = (
        f"# Trial {best.trial}, the best of {len(trials)} ({counts}): its {metric} on validation "
        f"episodes was {value:.4f}.\n# The search took {costs}.\n"
    )
    asked = search.chosen(algorithm, best.parameters).model_dump(mode="json", exclude_none=True)
    path = folder / f"best-{algorithm}.toml"
    write_text(path, note + tomli_w.dumps(asked))
    return path, best
