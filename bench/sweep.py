"""What was asked: a sweep (the grid), and the cells it comes to (one training and evaluation)."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

import algorithms
import datasets
from bench.errors import BenchError
from datasets import EpisodeSpec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MOST_BYTES = 1 << 20
"""Of a file with settings; they have some hundred."""
MOST_CELLS = 100_000
"""Of a sweep; more are a slip, and listing them alone would take hours."""
MOST_LETTERS = 200
"""Of a name or a word, which stands in tables, figures and file listings."""


def _no_truth(value: Any) -> Any:
    """``true`` is no number, though Python has it as 1."""
    if isinstance(value, bool):
        raise ValueError("input should be a number")
    return value


def _word(text: str) -> str:
    """A name as it can stand in a table, a terminal or a figure: a line of letters and signs."""
    if not text.isprintable():
        raise ValueError("input should have printable characters alone")
    return text


def _plain(value: Any) -> Any:
    """A value that is one number, truth value or word."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        if not abs(value) < 2**63:  # NaN is not, either
            raise ValueError("input should be a finite number of at most 63 bits")
        return value
    if not isinstance(value, str):
        raise ValueError("input should be a number, a truth value or a word")
    if len(value) > MOST_LETTERS:
        raise ValueError(f"input should have at most {MOST_LETTERS} characters")
    return _word(value)


def _without_null(path: Path) -> Path:
    if "\0" in str(path):
        raise ValueError("a path has no null character")
    return path


# What no training has more of: a slip of the finger is to be found before it fills the memory.
Number = Annotated[int, BeforeValidator(_no_truth)]
Few = Annotated[Number, Field(ge=1, le=10_000)]
"""Ways, shots, tasks: what is held in memory at one time."""
MOST_STEPS = 10_000
Steps = Annotated[Number, Field(ge=0, le=MOST_STEPS)]
Many = Annotated[Number, Field(ge=1, le=10**8)]
Natural = Annotated[Number, Field(ge=0, lt=2**63)]
Rate = Annotated[float, BeforeValidator(_no_truth), Field(gt=0, allow_inf_nan=False)]
Word = Annotated[str, Field(max_length=MOST_LETTERS), AfterValidator(_word)]
Plain = Annotated[Any, AfterValidator(_plain)]
Place = Annotated[Path, AfterValidator(_without_null)]


def _listed(kind: Callable[[str], Any]) -> BeforeValidator:
    """Lists are written ``1,5`` on the command line, and as lists in a file."""

    def split(value: Any) -> Any:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        items = value if isinstance(value, list | tuple) else [value]
        return [_parsed(kind, item) for item in items]

    return BeforeValidator(split)


def _parsed(kind: Callable[[str], Any], item: Any) -> Any:
    if isinstance(item, str):
        try:
            return kind(item)
        except ValueError:
            raise ValueError(f"{_shown(item)} is not an integer") from None
    return item


def literal(text: str) -> Any:
    """A value written on the command line: a number or a truth value where it reads as one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


Names = Annotated[list[Word], Field(min_length=1), _listed(str)]
Positives = Annotated[list[Few], Field(min_length=1), _listed(int)]
Naturals = Annotated[list[Natural], Field(min_length=1), _listed(int)]
Values = Annotated[list[Plain], Field(min_length=1), _listed(literal)]


class Settings(BaseModel):
    """How a cell is trained and evaluated, the algorithm's own hyperparameters apart.

    These are the defaults; an algorithm's for a dataset come before them, and a user's before both.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    iterations: Many = 150
    meta_batch: Few = 4
    meta_lr: Rate = 0.001
    meta_optimizer: Literal["adam", "sgd"] = "adam"
    meta_schedule: Literal["constant", "linear", "cosine"] = "constant"
    meta_clip: Rate | None = None
    test_shots: Few = 5
    train_shots: Few | None = None
    eval_steps: Steps = 3
    episodes: Annotated[Number, Field(ge=2, le=10**7)] = 600
    eval_seed: Natural = 0
    protocol: Literal["independent", "disjoint", "lake"] = "independent"
    val_episodes: Annotated[Number, Field(ge=1, le=10**7)] = 30
    val_every: Many | None = None
    model: Word | None = None


class Cell(Settings):
    """One training and evaluation: everything that decides its outcome.

    Attributes:
        train_shots: support shots of a training episode.
        hyperparameters: the algorithm's own, all of them.
    """

    train_shots: Few
    algorithm: Word
    dataset: Word
    ways: Few
    shots: Few
    seed: Natural
    device: Word
    hyperparameters: dict[Word, Plain]

    @cached_property
    def id(self) -> str:
        """A hash of the settings: equal for equal cells, on every machine."""
        canonical = json.dumps(self.model_dump(), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @cached_property
    def seedless_id(self) -> str:
        """The same for cells that differ in nothing but the seed."""
        return self.model_copy(update={"seed": 0}).id

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Cell:
        """A copy with other settings, and so with ids of its own."""
        copied = super().model_copy(update=update, deep=deep)
        for name in ("id", "seedless_id"):
            copied.__dict__.pop(name, None)
        return copied

    @property
    def setting(self) -> tuple[Any, ...]:
        """What cells have in common that are compared: all but the algorithm and its ways."""
        return (self.dataset, self.ways, self.shots, self.test_shots, self.seed, self.device)

    def train_spec(self, seed: int) -> EpisodeSpec:
        """A stream of training episodes."""
        shape = (self.ways, self.train_shots, self.test_shots)
        return EpisodeSpec(self.dataset, "train", *shape, seed)

    @property
    def val_spec(self) -> EpisodeSpec:
        """The stream of validation episodes: the same for every algorithm and every seed."""
        shape = (self.ways, self.shots, self.test_shots)
        return EpisodeSpec(self.dataset, "val", *shape, self.eval_seed)

    @property
    def test_spec(self) -> EpisodeSpec:
        """The stream of test episodes: the same for every algorithm and every seed."""
        shape = (self.ways, self.shots, self.test_shots)
        if self.protocol == "lake":  # its authors fixed the episodes
            return EpisodeSpec(self.dataset, "runs", *shape, 0)
        return EpisodeSpec(self.dataset, "test", *shape, self.eval_seed, self.protocol)

    @property
    def samples_per_step(self) -> int:
        """Labelled samples that a meta-step sees: support and query sets of its tasks."""
        try:
            regression = datasets.get(self.dataset).regression
        except datasets.DatasetError:  # a stored cell of a plug-in that is not there
            regression = False
        ways = 1 if regression else self.ways
        return self.meta_batch * ways * (self.train_shots + self.test_shots)

    @property
    def gradients_per_step(self) -> int:
        """Gradients evaluated in a meta-step, as the algorithm counts them."""
        try:
            count = algorithms.get(self.algorithm).gradients_per_task
        except algorithms.AlgorithmError:  # a stored cell of a plug-in that is not there
            count = algorithms.Algorithm.gradients_per_task
        return self.meta_batch * count(self.hyperparameters)

    def row(self) -> dict[str, Any]:
        """All settings as one table's row, the algorithm's own among them."""
        return self.model_dump(exclude={"hyperparameters"}) | self.hyperparameters

    def settings(self) -> dict[str, Any]:
        """What of the row can be set: all but the cell's place on the axes."""
        return self.model_dump(include=set(Settings.model_fields)) | self.hyperparameters

    def __str__(self) -> str:
        setting = f"{self.dataset} {self.ways}-way {self.shots}-shot seed {self.seed}"
        return f"{self.algorithm} {setting}"


def best_device() -> str:
    """The accelerator if there is one, else the CPU."""
    if torch.cuda.is_available():
        return "cuda:0"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


COMMON = ("inner_lr", "inner_steps", "norm", "engine", "checkpoint_inner", "tasks_per_pass")
"""Hyperparameters of every algorithm over the inner loop, which have options of their own."""
OPTIONS = (*Settings.model_fields, *COMMON)
"""What can stand beside the axes: on the command line, where it has an option, and in a file."""


class Sweep(BaseModel):
    """What a user asked for: axes, each a list.

    Attributes:
        set: settings, and hyperparameters of the algorithms, by name, each a list of values: an
            axis too. Those of :data:`OPTIONS` may be given beside the axes, one value or several.
            What is not here is left to the defaults.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    algos: Names = ["maml", "fomaml", "anil", "reptile"]
    datasets: Names = ["glyphs"]
    ways: Positives = [5]
    shots: Positives = [1]
    seeds: Naturals = [0]
    devices: Names = Field(default_factory=lambda: [best_device()])
    set: dict[Word, Values] = {}

    verify_gradients: bool = False
    data_root: Place | None = None
    download: bool = False
    plugin: Place | None = None

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Put the settings that were given beside the axes into ``set``."""
        beside = {name: given[name] for name in given if name in OPTIONS}
        # Runs of before there was a "set" have their other hyperparameters in a table.
        within: dict[str, Any] = {}
        for table in ("hyperparameters", "set"):
            if not isinstance(given.get(table, {}), Mapping):
                raise ValueError(f"'{table}' must be a table of settings")
            within |= given.get(table, {})
        if twice := beside.keys() & within.keys():
            raise ValueError(f"{min(twice)} is given twice, the second time by 'set'")
        others = {n: v for n, v in given.items() if n not in (*beside, "hyperparameters")}
        return others | {"set": beside | within}

    @model_validator(mode="after")
    def _check(self) -> Sweep:
        """Refuse what cannot be whatever the algorithms are; theirs may not be loaded yet."""
        for name, values in self.set.items():
            if name in type(self).model_fields:
                raise ValueError(f"{name} is not for 'set': it stands for itself")
            for value in values if name in Settings.model_fields else ():
                _setting(name, value)
        axes: list[Sequence[Any]] = [self.algos, self.datasets, self.ways, self.shots]
        axes += [self.seeds, self.devices, *self.set.values()]
        count = math.prod(len(values) for values in axes)
        if count > MOST_CELLS:
            raise ValueError(f"{count:,} cells were asked for; a sweep has at most {MOST_CELLS:,}")
        return self

    def cells(self) -> list[Cell]:
        """The cells of the grid, those that will be compared with one another side by side.

        A hyperparameter that an algorithm does not have makes it no further cells, nor do the ways
        of a regression.

        Raises:
            AlgorithmError, DatasetError, BenchError: a name or a value that cannot be.
        """
        self._check_names()
        points = [
            dict(zip(self.set, values, strict=True))
            for values in itertools.product(*self.set.values())
        ]
        cells = {
            cell.id: cell
            for dataset in self.datasets
            for point in itertools.product(
                *(self.ways_of(dataset), self.shots, self.seeds, self.devices, points, self.algos)
            )
            for cell in [self._cell(dataset, *point)]
        }
        return list(cells.values())

    def ways_of(self, dataset: str) -> list[int]:
        """The ways asked for, of which a regression's tasks have none: the first stands for all."""
        try:
            regression = datasets.get(dataset).regression
        except datasets.DatasetError:  # of a plug-in that is not here
            regression = False
        return self.ways[:1] if regression else self.ways

    def notes(self) -> list[str]:
        """What was asked of algorithms that do not have it."""
        lacking = {
            name: [a for a in self.algos if name not in _hyperparameters(a)]
            for name in self.set
            if name not in Settings.model_fields
        }
        return [
            f"note:  {', '.join(algos)} {'has' if len(algos) == 1 else 'have'} no {name}, and "
            f"{'runs' if len(algos) == 1 else 'run'} without"
            for name, algos in lacking.items()
            if algos
        ]

    def _check_names(self) -> None:
        owned = {name: None for algorithm in self.algos for name in _hyperparameters(algorithm)}
        known = (*Settings.model_fields, *owned)
        for name in self.set:
            if name not in known and name not in COMMON:
                who = ", ".join(self.algos)
                raise BenchError(
                    f"there is no setting {_shown(name)} of {who}{_nearest(name, known)}"
                )

    def _cell(
        self,
        dataset: str,
        ways: int,
        shots: int,
        seed: int,
        device: str,
        point: Mapping[str, Any],
        algorithm: str,
    ) -> Cell:
        kind = algorithms.get(algorithm)
        datasets.get(dataset)
        own = _hyperparameters(algorithm)
        suited = dict(kind.defaults.get("*", {})) | dict(kind.defaults.get(dataset, {}))
        asked = {
            name: value_of(algorithm, name, value)
            for name, value in point.items()
            if name in own or name in Settings.model_fields
        }
        chosen = suited | asked
        settings = {name: v for name, v in chosen.items() if name in Settings.model_fields}
        settings.setdefault("train_shots", shots)
        try:
            return Cell(
                **settings,
                algorithm=algorithm,
                dataset=dataset,
                ways=ways,
                shots=shots,
                seed=seed,
                device=device,
                hyperparameters=own | {n: v for n, v in chosen.items() if n in own},
            )
        except ValidationError as error:
            raise BenchError(f"{algorithm} on {dataset}: {first_fault(error)}") from error


def _hyperparameters(algorithm: str) -> dict[str, Any]:
    return _own(algorithms.get(algorithm))


@cache
def _own(kind: type[algorithms.Algorithm]) -> dict[str, Any]:
    return algorithms.hyperparameters(kind)  # from its signature, which is slow to read


def value_of(algorithm: str, name: str, value: Any) -> Any:
    """A value as the setting's type has it: ``1`` as 1.0 for a float, ``none`` as None.

    Raises:
        BenchError: it is not of that type.
    """
    if name in Settings.model_fields:
        try:
            return _setting(name, value)
        except ValueError as error:
            raise BenchError(str(error)) from error
    types = algorithms.hyperparameter_types(algorithms.get(algorithm))
    try:
        found = _typed(_adapter(types.get(name, Any)).validate_python, value)
    except ValidationError as error:
        raise BenchError(f"{algorithm}: {name.replace('_', '-')}: {_complaint(error)}") from error
    if isinstance(found, int) and abs(found) > MOST_STEPS:
        raise BenchError(f"{algorithm}: {name.replace('_', '-')}: {found:,} is more than any takes")
    return found


def _setting(name: str, value: Any) -> Any:
    """Raises :class:`ValueError` for what the setting cannot be."""
    try:
        return _typed(lambda given: getattr(Settings(**{name: given}), name), value)
    except ValidationError as error:
        raise ValueError(first_fault(error)) from error


def _typed(validate: Callable[[Any], Any], value: Any) -> Any:
    try:
        return validate(value)
    except ValidationError:
        if value != "none":
            raise
        return validate(None)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def read_sweep(path: Path | None, asked: Mapping[str, Any]) -> Sweep:
    """The sweep of a TOML file, with what the command line asked for put over it.

    Args:
        path: the file; None for none.
        asked: fields of :class:`Sweep` and of :data:`OPTIONS`; ``set`` may be a list of
            ``NAME=VALUE,VALUE``.

    Raises:
        BenchError: a file that cannot be read, an unknown key or a value that cannot be.
    """
    written: dict[str, Any] = {}
    if path is not None:
        written = _toml(path)
        known = (*Sweep.model_fields, *OPTIONS, "hyperparameters")
        for key in written:
            if key not in known:
                raise BenchError(f"{path}: there is no setting {_shown(key)}{_nearest(key, known)}")
    try:
        over = Sweep(**{**asked, "set": _assigned(asked.get("set", {}))})
        under = Sweep(**written)
    except ValidationError as error:
        raise BenchError(first_fault(error)) from error
    given = {name: getattr(over, name) for name in over.model_fields_set}
    return under.model_copy(update=given | {"set": under.set | over.set})


def _toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:  # which may be a device without end
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise BenchError(f"{path} has more than {MOST_BYTES >> 20} MiB; settings have not")
        return tomllib.loads(content.decode())
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror}") from error
    except BenchError:
        raise
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, lists in lists
        raise BenchError(f"{path} is not a TOML file: {error}") from error


def _assigned(given: Mapping[str, Any] | Iterable[str]) -> dict[str, Any]:
    """Assignments ``NAME=VALUE,VALUE`` by their name."""
    if isinstance(given, Mapping):
        return dict(given)
    found: dict[str, Any] = {}
    for text in given:
        name, sign, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not sign or not name:
            raise BenchError(f"--set: {text!r} is not NAME=VALUE,VALUE,...")
        if name in found:
            raise BenchError(f"--set: {name} is given twice")
        found[name] = values
    return found


def first_fault(error: ValidationError) -> str:
    """The first of pydantic's complaints, as one line."""
    place = [str(part) for part in error.errors()[0]["loc"] if part != "set"]
    return ": ".join([*(part.replace("_", "-") for part in place[:1]), _complaint(error)])


def _complaint(error: ValidationError) -> str:
    fault = error.errors()[0]
    message = fault["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    plain = isinstance(fault["input"], str | int | float | list | None)
    return f"{message} (got {_shown(fault['input'])})" if plain else message


def _shown(value: Any) -> str:
    """A value that was refused, or how it begins."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    except RecursionError:
        return "lists in lists"
    return text if len(text) <= 80 else f"{text[:80]}..."


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name[:MOST_LETTERS], list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"


def stream_seed(purpose: str, *address: int) -> int:
    """A seed for torch's generator: a stream of its own for each purpose and address."""
    text = "/".join([purpose, *map(str, address)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
