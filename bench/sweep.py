"""What was asked: a sweep (the grid), and the cells it comes to (one training and evaluation)."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

import algorithms
import datasets
from bench.errors import BenchError
from datasets import EpisodeSpec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


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
            raise ValueError(f"{item!r} is not an integer") from None
    return item


Names = Annotated[list[str], Field(min_length=1), _listed(str)]
Positives = Annotated[list[Positive], Field(min_length=1), _listed(int)]
Naturals = Annotated[list[Natural], Field(min_length=1), _listed(int)]


class Settings(BaseModel):
    """How a cell is trained and evaluated, the algorithm's own hyperparameters apart.

    These are the defaults; an algorithm's for a dataset come before them, and a user's before both.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    iterations: Positive = 150
    meta_batch: Positive = 4
    meta_lr: Rate = 0.001
    meta_optimizer: Literal["adam", "sgd"] = "adam"
    meta_schedule: Literal["constant", "linear", "cosine"] = "constant"
    meta_clip: Rate | None = None
    test_shots: Positive = 5
    train_shots: Positive | None = None
    eval_steps: Natural = 3
    episodes: Annotated[int, Field(ge=2)] = 600
    eval_seed: Natural = 0
    protocol: Literal["independent", "disjoint"] = "independent"
    val_episodes: Positive = 30
    val_every: Positive | None = None
    model: str | None = None


class Cell(Settings):
    """One training and evaluation: everything that decides its outcome.

    Attributes:
        train_shots: support shots of a training episode.
        hyperparameters: the algorithm's own, all of them.
    """

    train_shots: Positive
    algorithm: str
    dataset: str
    ways: int
    shots: int
    seed: int
    device: str
    hyperparameters: dict[str, Any]

    @property
    def id(self) -> str:
        """A hash of the settings: equal for equal cells, on every machine."""
        canonical = json.dumps(self.model_dump(), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @property
    def seedless_id(self) -> str:
        """The same for cells that differ in nothing but the seed."""
        return self.model_copy(update={"seed": 0}).id

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
        return EpisodeSpec(self.dataset, "test", *shape, self.eval_seed, self.protocol)

    @property
    def samples_per_step(self) -> int:
        """Labelled samples that a meta-step sees: support and query sets of its tasks."""
        return self.meta_batch * self.ways * (self.train_shots + self.test_shots)

    @property
    def gradients_per_step(self) -> int:
        """Gradients evaluated in a meta-step: inner ones, and one on each query set."""
        inner = algorithms.get(self.algorithm).adapts_in_training
        return self.meta_batch * (int(inner and self.hyperparameters.get("inner_steps", 0)) + 1)

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


class Sweep(BaseModel):
    """What a user asked for: axes, each a list, and settings; None leaves one to the defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    algos: Names = ["maml", "fomaml", "anil", "reptile"]
    datasets: Names = ["glyphs"]
    ways: Positives = [5]
    shots: Positives = [1]
    seeds: Naturals = [0]
    devices: Names = Field(default_factory=lambda: [best_device()])

    iterations: Positive | None = None
    meta_batch: Positive | None = None
    meta_lr: Rate | None = None
    meta_optimizer: Literal["adam", "sgd"] | None = None
    meta_schedule: Literal["constant", "linear", "cosine"] | None = None
    meta_clip: Rate | None = None
    test_shots: Positive | None = None
    train_shots: Positive | None = None
    eval_steps: Natural | None = None
    episodes: Annotated[int, Field(ge=2)] | None = None
    eval_seed: Natural | None = None
    protocol: Literal["independent", "disjoint"] | None = None
    val_episodes: Positive | None = None
    val_every: Positive | None = None
    model: str | None = None

    inner_lr: Rate | None = None
    inner_steps: Positive | None = None
    norm: str | None = None
    engine: str | None = None
    hyperparameters: dict[str, Any] = {}

    data_root: Path | None = None
    download: bool = False
    plugin: Path | None = None

    def cells(self) -> list[Cell]:
        """The cells of the grid, those that will be compared with one another side by side.

        Raises:
            AlgorithmError, DatasetError, BenchError: a name or a value that cannot be.
        """
        grid = itertools.product(
            *(self.datasets, self.ways, self.shots, self.seeds, self.devices, self.algos)
        )
        cells = {cell.id: cell for cell in (self._cell(*point) for point in grid)}
        return list(cells.values())

    def _cell(
        self, dataset: str, ways: int, shots: int, seed: int, device: str, algorithm: str
    ) -> Cell:
        kind = algorithms.get(algorithm)
        datasets.get(dataset)
        own = algorithms.hyperparameters(kind)
        suited = dict(kind.defaults.get("*", {})) | dict(kind.defaults.get(dataset, {}))
        asked = {
            name: value
            for name in type(self).model_fields
            if name in (*Settings.model_fields, "inner_lr", "inner_steps", "norm", "engine")
            and (value := getattr(self, name)) is not None
        } | self.hyperparameters
        for name in self.hyperparameters:
            if name not in own:
                raise BenchError(f"{algorithm} has no hyperparameter {name!r}{_nearest(name, own)}")
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


def read_sweep(path: Path | None, asked: dict[str, Any]) -> Sweep:
    """The sweep of a TOML file, with what the command line asked for put over it.

    Raises:
        BenchError: a file that cannot be read, an unknown key or a value that cannot be.
    """
    written: dict[str, Any] = {}
    if path is not None:
        try:
            written = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise BenchError(f"cannot read {path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise BenchError(f"{path} is not a TOML file: {error}") from error
        for key in written:
            if key not in Sweep.model_fields:
                hint = _nearest(key, Sweep.model_fields)
                raise BenchError(f"{path}: there is no setting {key!r}{hint}")
    try:
        return Sweep(**(written | asked))
    except ValidationError as error:
        raise BenchError(first_fault(error)) from error


def first_fault(error: ValidationError) -> str:
    """The first of pydantic's complaints, as one line."""
    fault = error.errors()[0]
    place = str(fault["loc"][0]) if fault["loc"] else "settings"
    message = fault["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    given = f" (got {fault['input']!r})" if not isinstance(fault["input"], dict) else ""
    return f"{place.replace('_', '-')}: {message}{given}"


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"


def stream_seed(purpose: str, *address: int) -> int:
    """A seed for torch's generator: a stream of its own for each purpose and address."""
    text = "/".join([purpose, *map(str, address)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
