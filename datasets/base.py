"""What a dataset is to the rest of the project: a name, its splits, and a way to read one."""

from __future__ import annotations

import difflib
import importlib
import os
import pkgutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import ClassVar, TypeVar

import platformdirs

from datasets.episodes import DatasetError, Source

APPLICATION = "fewshot-bench"


class Dataset(ABC):
    """A dataset by name. One file a dataset, and in it one class a way of splitting it.

    Args:
        root: the folder that holds data sets, each in a folder of its own; by default
            ``$BENCH_DATA`` if set, else the user's cache folder.
        download: fetch what is missing, where the dataset knows an address.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for ``python -m bench list datasets``."""
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    regression: ClassVar[bool] = False
    """Whether a task is of one function, whose points are the shots; then the ways are a part of an
    episode's address and nothing else."""

    def __init__(self, root: Path | str | None = None, download: bool = False) -> None:
        self.root = Path(root).expanduser() if root else data_root()
        self.download = download

    @abstractmethod
    def load(self, split: str) -> Source:
        """Read one split.

        Raises:
            DatasetError: data that is absent, cut short or corrupt; one line with the path.
        """


def data_root() -> Path:
    """Where data sets are looked for unless told otherwise."""
    chosen = os.environ.get("BENCH_DATA")
    return Path(chosen).expanduser() if chosen else cache_folder()


def cache_folder() -> Path:
    """Where what was derived from data (rendered, decoded) is kept; always the user's own."""
    return Path(platformdirs.user_cache_dir(APPLICATION))


_registry: dict[str, type[Dataset]] = {}
D = TypeVar("D", bound=type[Dataset])


def register(name: str) -> Callable[[D], D]:
    """Class decorator: make a :class:`Dataset` known under ``name``.

    Raises:
        DatasetError: another class has the name.
    """

    def add(dataset: D) -> D:
        known = _registry.get(name, dataset)
        # A file that is run again brings the same class again.
        if (known.__module__, known.__qualname__) != (dataset.__module__, dataset.__qualname__):
            raise DatasetError(f"two datasets are called {name!r}")
        dataset.name = name
        _registry[name] = dataset
        return dataset

    return add


def names() -> list[str]:
    """Every registered dataset: the built-in ones, then those that other packages added."""
    _import_built_in()
    for entry in entry_points(group="bench.datasets"):
        if entry.name not in _registry:
            try:
                register(entry.name)(entry.load())
            except Exception as error:  # a fault of that package, and no reason to do without all
                offered = f"{entry.value}, offered as dataset {entry.name!r}"
                warnings.warn(f"{offered}, cannot be loaded: {error}", stacklevel=2)
    return list(_registry)


def _import_built_in() -> None:
    package = importlib.import_module("datasets")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"datasets.{module.name}")


def get(name: str) -> type[Dataset]:
    """The class registered under ``name``.

    Raises:
        DatasetError: no such name; the message has the nearest one.
    """
    if name not in _registry:
        _import_built_in()
    if name not in _registry and name not in names():  # looking for packages takes milliseconds
        near = difflib.get_close_matches(name, _registry, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(_registry)}"
        raise DatasetError(f"no dataset is called {name!r}; {hint}")
    return _registry[name]
