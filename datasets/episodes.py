"""Deterministic episodes: addressed, not drawn.

Episode ``i`` of ``(dataset, split, ways, shots, test_shots, seed)`` is a pure function of those
values. The tuple is hashed into the key of a counter-based generator (Philox4x64-10; Salmon et al.
2011) and ``i`` is its counter, so any episode can be made directly, on its own, whatever the batch
size, the device or the order in which episodes are asked for.

Only the generator's raw 64-bit words are used, ranked or scaled here: NumPy keeps those fixed
between versions, and does not promise as much for ``choice`` or ``permutation``.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Batch = dict[str, tuple[Tensor, Tensor]]
"""torchmeta's batch: ``{"train": (inputs, targets), "test": (inputs, targets)}``; ``train`` is the
support set and ``test`` the query set, and every tensor's first dimension counts tasks. Beside
them ``"classes"``, where a source has any, is the class of each sample of the two sets as its
number within the split: int64, of the targets' shapes."""

Task = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``((x_support, y_support), (x_query, y_query))``, as tutorials write one task."""

Words = npt.NDArray[np.uint64]


PROTOCOLS = ("independent", "disjoint")


class DatasetError(ValueError):
    """What was asked of a dataset cannot be had; the message is one line and says what can."""


@dataclass(frozen=True)
class EpisodeSpec:
    """The shape of an episode, and the stream it comes from: with an index, its address.

    Episodes of the protocol ``independent``, the usual one, are drawn each on its own and so share
    samples with one another. Those of ``disjoint`` share none, and there are only so many: an
    interval over them does not understate the uncertainty about new data (Lafargue et al. 2024,
    arXiv 2409.02850).
    """

    dataset: str
    split: str
    ways: int
    shots: int
    test_shots: int
    seed: int
    protocol: str = "independent"
    key: Words = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, least in (("ways", 1), ("shots", 1), ("test_shots", 1), ("seed", 0)):
            value = getattr(self, name)
            whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
            if not whole or value < least:
                raise DatasetError(
                    f"{name} is {value!r}; it must be an integer of at least {least}"
                )
            object.__setattr__(self, name, int(value))
        if self.protocol not in PROTOCOLS:
            raise DatasetError(
                f"protocol is {self.protocol!r}; it must be one of {', '.join(PROTOCOLS)}"
            )
        digest = hashlib.sha256(self.address.encode()).digest()
        object.__setattr__(self, "key", np.frombuffer(digest[:16], dtype=np.uint64))

    @property
    def address(self) -> str:
        """What decides every episode of the stream, as text."""
        return (
            f"{self.dataset}/{self.split}/ways={self.ways}/shots={self.shots}"
            f"/test_shots={self.test_shots}/seed={self.seed}"
            + ("/disjoint" if self.protocol == "disjoint" else "")
        )

    def words(self, index: int, count: int) -> Words:
        """The first ``count`` random words of episode ``index``: uint64 ``(count,)``."""
        # The index sits in the counter's third word, so that episodes cannot overlap: one would
        # have to use 2**128 blocks to reach the next.
        counter = np.array([0, 0, index, 0], dtype=np.uint64)
        words: Words = _generator.at(self.key, counter).random_raw(count)
        return words


class _Generator(threading.local):
    """A Philox generator of each thread, moved to where it is needed: to make one for each episode
    takes five times as long."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(key=0)
        self.start = self.philox.state  # with nothing in its buffers

    def at(self, key: Words, counter: Words) -> np.random.Philox:
        """The generator that starts at a counter."""
        self.philox.state = self.start | {"state": {"key": key, "counter": counter}}
        return self.philox


_generator = _Generator()


class Source(ABC):
    """One split of a dataset, held in memory on one device, from which episodes are made."""

    sample_shape: tuple[int, ...]
    """Shape of one input."""
    outputs: int | None = None
    """Size of a regression target; None for classification, where the ways decide."""

    @abstractmethod
    def check(self, spec: EpisodeSpec) -> None:
        """Raise :class:`DatasetError` if this split cannot fill such an episode."""

    @property
    def digest(self) -> str | None:
        """A hash of the data, which tells them from others of the same name; None where an address
        alone decides an episode."""
        return None

    def episodes(self, spec: EpisodeSpec) -> int | None:
        """How many episodes the stream has; None for one without end."""
        return None

    def reuse(self, spec: EpisodeSpec, episodes: int) -> float | None:
        """How often that many episodes use each sample, on average; None where samples are new."""
        return None

    def class_count(self) -> int | None:
        """How many classes the split has; None where there are no classes."""
        return None

    def classes_of(self, spec: EpisodeSpec, episodes: int) -> npt.NDArray[np.int64] | None:
        """The classes of the first episodes of a stream ``(episodes, ways)``, as numbers within
        the split; None where there are no classes."""
        return None

    @abstractmethod
    def batch(self, spec: EpisodeSpec, indices: Sequence[int]) -> Batch:
        """The episodes of these indices as one batch."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Source:
        """This source with its data on ``device``."""


@dataclass(frozen=True, eq=False)
class ClassSource(Source):
    """Samples indexed by class.

    Args:
        samples: uint8 ``(N, *sample_shape)``, the samples of a class side by side.
        counts: samples in each class, in order; they sum to N.
        classes: a name for each class.
        originals: for each class the number of what it was made from, such as the upright
            character that it is a rotation of: the i-th samples of classes with one number are the
            same original. None where no two classes share any.
    """

    samples: Tensor
    counts: Sequence[int]
    classes: Sequence[str]
    originals: Sequence[int] | None = None
    _counts: npt.NDArray[np.int64] = field(init=False, repr=False)
    _starts: npt.NDArray[np.int64] = field(init=False, repr=False)
    _arranged: dict[EpisodeSpec, list[tuple[npt.NDArray[np.int64], ...]]] = field(
        init=False, repr=False
    )

    def __post_init__(self) -> None:
        if sum(self.counts) != len(self.samples) or len(self.counts) != len(self.classes):
            raise DatasetError(
                f"{len(self.samples)} samples and {len(self.classes)} class names do not fit "
                f"{len(self.counts)} classes of {sum(self.counts)} samples in all"
            )
        if self.samples.dtype != torch.uint8:
            raise DatasetError(
                f"samples are {self.samples.dtype}; they must be torch.uint8, 0 to 255"
            )
        if any(len({self.counts[each] for each in kin}) > 1 for kin in self._kin):
            raise DatasetError("classes of the same originals differ in how many they have")
        object.__setattr__(self, "sample_shape", tuple(self.samples.shape[1:]))
        counts = np.asarray(self.counts, dtype=np.int64)
        object.__setattr__(self, "_counts", counts)
        object.__setattr__(self, "_starts", np.cumsum(counts) - counts)
        object.__setattr__(self, "_arranged", {})

    @cached_property
    def digest(self) -> str:
        return digest_of(self.samples, torch.tensor(self.counts))

    def check(self, spec: EpisodeSpec) -> None:
        where = f"{spec.dataset} has in its {spec.split} split"
        if spec.ways > len(self.counts):
            raise DatasetError(
                f"{spec.ways} ways were asked for; {where} {len(self.counts)} classes"
            )
        needed, least = spec.shots + spec.test_shots, min(self.counts)
        if needed > least:
            raise DatasetError(
                f"{spec.shots} shots and {spec.test_shots} test shots need {needed} samples a "
                f"class; {where} a class with {least}"
            )

    def indices(self, spec: EpisodeSpec, index: int) -> tuple[npt.NDArray[np.int64], ...]:
        """Which samples make up one episode: sample numbers ``(ways, shots + test_shots)`` and the
        label of each row ``(ways,)``."""
        counts, starts = self._counts, self._starts
        if spec.protocol == "disjoint":
            return self._disjoint(spec)[index]
        width = int(counts.max())
        words = spec.words(index, len(counts) + spec.ways + spec.ways * width)
        classes = first_ranks(words[: len(counts)], spec.ways)
        labels = np.argsort(words[len(counts) : len(counts) + spec.ways], kind="stable")
        order = words[len(counts) + spec.ways :].reshape(spec.ways, width)
        # A class with fewer samples than the largest ranks only as many words as it has samples.
        order = np.where(np.arange(width) < counts[classes, None], order, np.iinfo(np.uint64).max)
        chosen = np.argsort(order, axis=1, kind="stable")[:, : spec.shots + spec.test_shots]
        return starts[classes, None] + chosen, labels

    def episodes(self, spec: EpisodeSpec) -> int | None:
        return len(self._disjoint(spec)) if spec.protocol == "disjoint" else None

    def reuse(self, spec: EpisodeSpec, episodes: int) -> float | None:
        distinct = sum(self.counts[classes[0]] for classes in self._kin)
        return episodes * spec.ways * (spec.shots + spec.test_shots) / distinct

    def class_count(self) -> int:
        return len(self.counts)

    def classes_of(self, spec: EpisodeSpec, episodes: int) -> npt.NDArray[np.int64]:
        return self._owners(np.stack([self.indices(spec, i)[0] for i in range(episodes)]))

    def _owners(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The classes of episodes' samples ``(episodes, ways, n)``: ``(episodes, ways)``."""
        firsts = samples[:, :, 0]
        found: npt.NDArray[np.int64] = np.searchsorted(self._starts, firsts, side="right") - 1
        return found

    @cached_property
    def _kin(self) -> list[list[int]]:
        """The classes, those together that share their originals."""
        kin: dict[int, list[int]] = {}
        for index in range(len(self.counts)):
            number = index if self.originals is None else self.originals[index]
            kin.setdefault(number, []).append(index)
        return list(kin.values())

    def _disjoint(self, spec: EpisodeSpec) -> list[tuple[npt.NDArray[np.int64], ...]]:
        """Every episode of a disjoint stream.

        The samples of each class are dealt into hands of ``shots + test_shots``; classes that share
        their originals share the hands, each of which goes to one of them, in turn from a random
        one. Each episode takes one hand of the ``ways`` classes that have most left, ties broken at
        random, which makes as many episodes of distinct classes as there can be.
        """
        if spec not in self._arranged:
            size = spec.shots + spec.test_shots
            hands: list[list[npt.NDArray[np.int64]]] = [[] for _ in self.counts]
            for classes in self._kin:
                first, count = classes[0], int(self._counts[classes[0]])
                words = spec.words(first, count)
                order = np.argsort(words, kind="stable")
                dealt = order[: count // size * size].reshape(-1, size)
                turn = int(words[0] % np.uint64(len(classes)))
                for place, hand in enumerate(dealt, start=turn):
                    owner = classes[place % len(classes)]
                    hands[owner].append(self._starts[owner] + hand)
            episodes: list[tuple[npt.NDArray[np.int64], ...]] = []
            left = np.array([len(dealt) for dealt in hands])
            while np.count_nonzero(left) >= spec.ways:
                words = spec.words(len(hands) + len(episodes), len(hands) + spec.ways)
                chosen = np.lexsort((words[: len(hands)], -left))[: spec.ways]
                labels = np.argsort(words[len(hands) :], kind="stable")
                episodes.append((np.stack([hands[c].pop() for c in chosen]), labels))
                left[chosen] -= 1
            self._arranged[spec] = episodes
        return self._arranged[spec]

    def batch(self, spec: EpisodeSpec, indices: Sequence[int]) -> Batch:
        drawn = [self.indices(spec, index) for index in indices]
        samples = np.stack([samples for samples, _ in drawn])
        of_rows = (samples, np.stack([labels for _, labels in drawn]), self._owners(samples))
        chosen, labels, classes = (torch.from_numpy(v).to(self.samples.device) for v in of_rows)
        support, query = chosen[..., : spec.shots], chosen[..., spec.shots :]
        tasks = len(drawn)

        def inputs(part: Tensor) -> Tensor:
            values = floats(self.samples[part.flatten()])
            return values.view(tasks, -1, *self.sample_shape)

        def each(values: Tensor, part: Tensor) -> Tensor:
            """The value of its row for each sample ``(tasks, ways * n)``."""
            return values[:, :, None].expand(part.shape).reshape(tasks, -1)

        return {
            "train": (inputs(support), each(labels, support)),
            "test": (inputs(query), each(labels, query)),
            "classes": (each(classes, support), each(classes, query)),
        }

    def to(self, device: torch.device | str) -> ClassSource:
        return replace(self, samples=self.samples.to(device))


def floats(samples: Tensor) -> Tensor:
    """Of bytes 0 to 255 the numbers from 0 to 1, in float32, the same on every device: by a number
    a GPU divides through its reciprocal, which differs in the last bit."""
    whole = torch.full((), 255.0, device=samples.device)
    return samples.to(torch.float32).div_(whole)


def digest_of(*tensors: Tensor) -> str:
    """A hash of tensors: of their shapes and all of their values."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tuple(tensor.shape)} {tensor.dtype}\0".encode())
        found.update(tensor.cpu().contiguous().numpy().data)
    return found.hexdigest()[:16]


def first_ranks(words: Words, count: int) -> npt.NDArray[np.int64]:
    """Positions of the ``count`` smallest words in ascending order: a random sample without
    replacement. Partitioning first keeps it linear in the number of classes."""
    smallest = np.argpartition(words, count - 1)[:count]
    ranks: npt.NDArray[np.int64] = smallest[np.argsort(words[smallest], kind="stable")]
    return ranks


def uniform(words: Words) -> npt.NDArray[np.float64]:
    """Random words as numbers in [0, 1), from their highest 53 bits."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True, eq=False)
class EpisodeLoader:
    """A stream of batches; ``loader[i]`` is batch ``i``, directly.

    Batch ``i`` holds episodes ``i * batch_size`` to ``(i + 1) * batch_size - 1`` of the stream. It
    has a length where its episodes are disjoint, and no end where they are independent.
    """

    source: Source
    spec: EpisodeSpec
    batch_size: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.batch_size, int | np.integer) or self.batch_size < 1:
            raise DatasetError(
                f"batch_size is {self.batch_size}; it must be an integer of at least 1"
            )
        self.source.check(self.spec)

    def __getitem__(self, index: int) -> Batch:
        first, past = index * self.batch_size, (index + 1) * self.batch_size
        episodes = self.source.episodes(self.spec)
        if index < 0 or (episodes is not None and first >= episodes):
            raise IndexError(f"there is no batch {index} in {self.spec.address}")
        return self.source.batch(self.spec, range(first, min(past, episodes or past)))

    def __len__(self) -> int:
        episodes = self.source.episodes(self.spec)
        if episodes is None:
            raise TypeError("a stream of independent episodes has no length")
        return -(-episodes // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        endless = self.source.episodes(self.spec) is None
        for index in itertools.count() if endless else range(len(self)):
            yield self[index]


def collate(tasks: Sequence[Task]) -> Batch:
    """Stack tasks written as ``((x_support, y_support), (x_query, y_query))`` into a batch.

    Args:
        tasks: at least one task; all of the same shapes. Integer targets mean classification,
            floating targets regression.

    Raises:
        DatasetError: no tasks, or tasks whose shapes differ.
    """
    if not tasks:
        raise DatasetError("a batch needs at least one task")

    def half(part: int) -> tuple[Tensor, Tensor]:
        inputs = [torch.as_tensor(task[part][0]) for task in tasks]
        targets = [torch.as_tensor(task[part][1]) for task in tasks]
        for tensors in (inputs, targets):
            shapes = sorted({tuple(tensor.shape) for tensor in tensors})
            if len(shapes) > 1:
                raise DatasetError(f"tasks of one batch must have one shape, not {shapes}")
        x, y = torch.stack(inputs), torch.stack(targets)
        return x.to(torch.float32), y if y.is_floating_point() else y.to(torch.int64)

    return {"train": half(0), "test": half(1)}
