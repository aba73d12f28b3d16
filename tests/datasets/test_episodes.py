from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import datasets
from datasets import (
    Batch,
    ClassSource,
    DatasetError,
    EpisodeLoader,
    EpisodeSpec,
    collate,
)
from datasets.episodes import first_ranks, floats, uniform
from tests.accelerator import DEVICE, accelerator

COUNTS = (7, 4, 12, 5, 9, 6)

GOLDEN_WORDS = [1232494602703534022, 13834237696540456442]
GOLDEN_EPISODE = {
    "train": ([[0, 5], [0, 4], [2, 9], [2, 4], [4, 0], [4, 3]], [2, 2, 0, 0, 1, 1]),
    "test": ([[0, 2], [0, 6], [2, 0], [2, 1], [4, 6], [4, 5]], [2, 2, 0, 0, 1, 1]),
}


def source(counts: tuple[int, ...] = COUNTS) -> ClassSource:
    """Every sample is its class and its number in the class."""
    samples = [(index, number) for index, count in enumerate(counts) for number in range(count)]
    names = [f"class {index}" for index in range(len(counts))]
    return ClassSource(torch.tensor(samples, dtype=torch.uint8), counts, names)


def spec(**changes: Any) -> EpisodeSpec:
    return replace(EpisodeSpec("toy", "train", ways=3, shots=2, test_shots=2, seed=0), **changes)


def loader(batch_size: int = 1, **changes: Any) -> EpisodeLoader:
    return EpisodeLoader(source(), spec(**changes), batch_size)


def decoded(inputs: Tensor) -> Tensor:
    """Class and number in it of each sample: int ``(..., 2)``."""
    return (inputs * 255).round().int()


def equal(one: Batch, other: Batch) -> bool:
    return all(
        torch.equal(a, b)
        for half in ("train", "test")
        for a, b in zip(one[half], other[half], strict=True)
    )


def task(batch: Batch, index: int) -> Batch:
    return {half: (x[index : index + 1], y[index : index + 1]) for half, (x, y) in batch.items()}


def test_a_digest_tells_data_apart_and_nothing_else() -> None:
    known = source().digest
    assert source().to("cpu").digest == known
    named = ClassSource(source().samples, COUNTS, [f"other {i}" for i in range(len(COUNTS))])
    assert named.digest == known
    changed = source().samples.clone()
    changed[-1, -1] += 1
    moved = (COUNTS[0] + 1, COUNTS[1] - 1, *COUNTS[2:])
    shaped = source().samples.reshape(-1, 2, 1)
    others = [
        ClassSource(samples, counts, named.classes).digest
        for samples, counts in ((changed, COUNTS), (named.samples, moved), (shaped, COUNTS))
    ]
    assert len({known, *others}) == 4


shapes = st.fixed_dictionaries(
    {
        "ways": st.integers(1, len(COUNTS)),
        "shots": st.integers(1, 2),
        "test_shots": st.integers(1, 2),
        "seed": st.integers(0, 2**70),
    }
)


@settings(deadline=None)
@given(shapes, st.integers(0, 10**9), st.integers(1, 9))
def test_an_episode_is_the_same_in_batches_of_any_size(
    shape: dict[str, int], index: int, batch_size: int
) -> None:
    batch = loader(batch_size, **shape)[index // batch_size]
    assert equal(task(batch, index % batch_size), loader(**shape)[index])


@settings(deadline=None)
@given(shapes, st.integers(0, 2**63))
def test_every_episode_is_well_formed(shape: dict[str, int], index: int) -> None:
    ways = shape["ways"]
    batch = loader(**shape)[index]
    seen: dict[str, Tensor] = {}
    for half, shots in (("train", shape["shots"]), ("test", shape["test_shots"])):
        inputs, targets = batch[half]
        assert inputs.dtype == torch.float32
        assert targets.dtype == torch.int64
        assert inputs.shape == (1, ways * shots, 2)
        assert targets.shape == (1, ways * shots)
        labels = targets.view(ways, shots)
        classes = decoded(inputs).view(ways, shots, 2)[..., 0]
        # class by class, each class under one label of its own
        assert (labels == labels[:, :1]).all()
        assert (classes == classes[:, :1]).all()
        assert sorted(labels[:, 0].tolist()) == list(range(ways))
        seen[half] = torch.cat([classes[:, :1], labels[:, :1]], 1)
    assert torch.equal(seen["train"], seen["test"]), "the halves name the classes differently"
    assert len(set(seen["train"][:, 0].tolist())) == ways
    samples = torch.cat([decoded(batch[half][0])[0] for half in ("train", "test")])
    pairs = [tuple(pair) for pair in samples.tolist()]
    assert len(set(pairs)) == len(pairs), "a sample is used twice"
    assert all(number < COUNTS[index] for index, number in pairs)


def test_every_class_label_and_sample_is_equally_likely() -> None:
    episodes = 6000
    batch = loader(episodes, ways=2, shots=1, test_shots=1)[0]
    samples = decoded(batch["train"][0])
    classes = Counter(samples[..., 0].flatten().tolist())
    assert set(classes) == set(range(len(COUNTS)))
    for count in classes.values():
        assert count == pytest.approx(episodes * 2 / len(COUNTS), rel=0.1)
    for index, size in enumerate(COUNTS):
        numbers = Counter(samples[samples[..., 0] == index][:, 1].tolist())
        assert set(numbers) == set(range(size))
        for count in numbers.values():
            assert count == pytest.approx(classes[index] / size, rel=0.35)
    first_label = batch["train"][1][:, 0].float().mean().item()
    assert first_label == pytest.approx(0.5, abs=0.03)


def test_the_order_of_classes_and_labels_is_not_that_of_the_source() -> None:
    batch = loader(2000, ways=3, shots=1)[0]
    classes = decoded(batch["train"][0])[..., 0]
    orders = Counter(tuple(np.argsort(row)) for row in classes.tolist())
    permutations = Counter(tuple(row) for row in batch["train"][1].tolist())
    for counts in (orders, permutations):
        assert len(counts) == 6
        assert min(counts.values()) > 250


@pytest.mark.parametrize(
    "change",
    [
        {"dataset": "other"},
        {"split": "test"},
        {"seed": 1},
        {"ways": 4},
        {"shots": 1},
        {"test_shots": 1},
    ],
)
def test_another_address_is_another_stream(change: dict[str, Any]) -> None:
    changed = spec(**change)
    assert changed.address != spec().address
    assert not np.array_equal(changed.words(0, 8), spec().words(0, 8))


def test_episodes_of_a_stream_differ() -> None:
    words = {spec().words(index, 4).tobytes() for index in [*range(500), 2**32, 2**63]}
    assert len(words) == 502


def test_more_words_of_an_episode_begin_with_the_fewer() -> None:
    assert np.array_equal(spec().words(5, 1000)[:7], spec().words(5, 7))


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2**63), st.integers(1, 40)), max_size=9)
)
def test_words_are_those_of_a_new_generator_whatever_was_asked_for_before(
    asked: list[tuple[int, int, int]],
) -> None:
    for seed, index, count in asked:
        of = spec(seed=seed)
        counter = np.array([0, 0, index, 0], dtype=np.uint64)
        anew = np.random.Philox(key=of.key, counter=counter)
        assert np.array_equal(of.words(index, count), anew.random_raw(count))


def test_the_stream_stays_what_it_is() -> None:
    """Published episodes are known by address: a change of these values changes all of them."""
    assert spec(seed=7).words(12, 2).tolist() == GOLDEN_WORDS
    batch = loader(seed=7)[12]
    for half, (samples, labels) in GOLDEN_EPISODE.items():
        assert decoded(batch[half][0])[0].tolist() == samples
        assert batch[half][1][0].tolist() == labels


def test_iteration_is_indexing_without_end() -> None:
    episodes = loader(3)
    for index, batch in enumerate(islice(episodes, 4)):
        assert equal(batch, episodes[index])
    with pytest.raises(IndexError, match="there is no batch -1"):
        episodes[-1]
    with pytest.raises(TypeError):
        len(episodes)  # type: ignore[arg-type]


def test_samples_are_scaled_to_the_unit_interval() -> None:
    white = ClassSource(torch.full((4, 1, 2, 2), 255, dtype=torch.uint8), (2, 2), "ab")
    inputs = EpisodeLoader(white, spec(ways=2, shots=1, test_shots=1))[0]["train"][0]
    assert inputs.shape == (1, 2, 1, 2, 2)
    assert (inputs == 1).all()


@pytest.mark.parametrize("name", ["toy", "sinusoid"])
def test_episodes_are_made_on_an_accelerator_without_waiting_for_it(name: str) -> None:
    given = source() if name == "toy" else datasets.get(name)().load("train")
    expected = EpisodeLoader(given, spec(), 3)[2]
    with accelerator() as log:
        there = EpisodeLoader(given.to(DEVICE), spec(), 3)
        log.asked.clear()
        batch = there[2]
        assert log.asked == []
        for half in ("train", "test"):
            for one, other in zip(expected[half], batch[half], strict=True):
                assert other.device == torch.device(DEVICE)
                assert torch.equal(one, other.cpu())


def test_a_source_moves_with_its_episodes_unchanged() -> None:
    moved = EpisodeLoader(source().to("cpu"), spec())
    assert equal(moved[3], loader()[3])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"ways": 7}, "7 ways were asked for; toy has in its train split 6 classes"),
        ({"shots": 3}, "need 5 samples a class; toy has in its train split a class with 4"),
    ],
)
def test_a_split_too_small_for_its_episodes_is_refused(shape: Any, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        loader(**shape)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ways", 0),
        ("shots", 0),
        ("test_shots", 0),
        ("seed", -1),
        ("shots", -2),
        ("ways", 2.0),
        ("seed", "7"),
        ("shots", True),
        ("seed", None),
    ],
)
def test_numbers_that_no_episode_can_have_are_refused(name: str, value: Any) -> None:
    with pytest.raises(DatasetError, match=f"{name} is {value!r}; it must be an integer of at"):
        spec(**{name: value})


def test_a_batch_of_no_tasks_is_refused() -> None:
    with pytest.raises(DatasetError, match="batch_size is 0"):
        loader(0)


@pytest.mark.parametrize(("counts", "names"), [((2, 3), "ab"), ((2, 2), "abc"), ((4,), "ab")])
def test_a_source_that_does_not_add_up_is_refused(counts: tuple[int, ...], names: str) -> None:
    with pytest.raises(DatasetError, match="do not fit"):
        ClassSource(torch.zeros(4, 1, dtype=torch.uint8), counts, names)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=30, unique=True), st.data())
def test_first_ranks_are_the_positions_of_the_smallest(values: list[int], data: Any) -> None:
    count = data.draw(st.integers(1, len(values)))
    ranks = first_ranks(np.array(values, dtype=np.uint64), count)
    assert [values[rank] for rank in ranks] == sorted(values)[:count]


def test_uniform_covers_the_half_open_unit_interval() -> None:
    ends = uniform(np.array([0, 2**64 - 1], dtype=np.uint64))
    assert ends[0] == 0
    assert 1 - 1e-15 < ends[1] < 1


def classification(query: int = 4) -> Any:
    """A task as tutorials write one."""
    return (
        (torch.rand(6, 1, 5, 5), torch.arange(6) % 3),
        (torch.rand(query, 1, 5, 5, dtype=torch.float64), torch.arange(query, dtype=torch.int32)),
    )


def test_collate_stacks_tasks_into_the_batch_contract() -> None:
    tasks = [classification(), classification()]
    batch = collate(tasks)
    assert list(batch) == ["train", "test"]
    assert batch["train"][0].shape == (2, 6, 1, 5, 5)
    assert batch["test"][0].dtype == torch.float32
    assert batch["test"][1].dtype == torch.int64
    assert torch.equal(batch["train"][0][1], tasks[1][0][0])


def test_collate_keeps_targets_of_regression_as_floats() -> None:
    half = (torch.rand(3, 1), torch.rand(3, 1, dtype=torch.float64))
    assert collate([(half, half)])["train"][1].dtype == torch.float64


def test_collate_takes_arrays() -> None:
    half = (np.zeros((2, 3)), np.array([0, 1]))
    batch = collate([(half, half)])  # type: ignore[list-item]
    assert batch["train"][0].shape == (1, 2, 3)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "at least one task"),
        ([classification(4), classification(5)], r"one shape, not \[\(4, 1, 5, 5\), \(5, 1"),
    ],
)
def test_collate_refuses_what_has_no_common_shape(tasks: Any, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        collate(tasks)


def disjoint(classes: int, samples: int, **shape) -> EpisodeLoader:
    counts = [samples] * classes
    numbered = torch.arange(sum(counts)).to(torch.int64)
    # Three bytes a sample, so that each tells its own number.
    pixels = torch.stack([numbered % 256, numbered // 256 % 256, numbered // 65536], dim=1)
    source = ClassSource(pixels.to(torch.uint8), counts, [str(c) for c in range(classes)])
    spec = EpisodeSpec("toy", "test", **shape, seed=0, protocol="disjoint")
    return EpisodeLoader(source, spec, batch_size=1)


def numbers(inputs: torch.Tensor) -> list[int]:
    digits = (inputs * 255).round().to(torch.int64)
    return (digits[..., 0] + 256 * digits[..., 1] + 65536 * digits[..., 2]).flatten().tolist()


def test_no_two_disjoint_episodes_share_a_sample_and_each_has_distinct_classes() -> None:
    episodes = disjoint(7, 20, ways=3, shots=1, test_shots=5)
    seen: list[int] = []
    for batch in episodes:
        support, query = numbers(batch["train"][0]), numbers(batch["test"][0])
        assert len({n // 20 for n in support}) == 3
        assert {n // 20 for n in query} == {n // 20 for n in support}
        seen += support + query
    assert len(seen) == len(set(seen))


def test_there_are_as_many_disjoint_episodes_as_the_samples_allow() -> None:
    # miniImageNet's test split: 20 classes of 600, 5-way 1-shot with 15 queries.
    assert len(disjoint(20, 600, ways=5, shots=1, test_shots=15)) == 20 * (600 // 16) // 5
    assert len(disjoint(7, 20, ways=3, shots=1, test_shots=5)) == 7 * 3 // 3


def test_a_disjoint_stream_ends_and_an_independent_one_does_not() -> None:
    episodes = disjoint(4, 6, ways=2, shots=1, test_shots=2)
    assert len(list(episodes)) == len(episodes) == 4
    with pytest.raises(IndexError, match="there is no batch 4"):
        episodes[4]
    with pytest.raises(TypeError, match="has no length"):
        len(loader(3))


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(DatasetError, match="protocol is 'once'; it must be one of independent"):
        EpisodeSpec("toy", "test", 2, 1, 1, 0, "once")


@pytest.mark.parametrize("protocol", ["independent", "disjoint"])
def test_the_classes_of_an_episode_are_those_of_its_samples(protocol: str) -> None:
    spec = EpisodeSpec("letters", "test", ways=3, shots=1, test_shots=2, seed=4, protocol=protocol)
    batch = source().batch(spec, range(3))
    drawn = (batch["test"][0][..., 0] * 255).round().long().reshape(3, 3, 2)
    assert (drawn == torch.from_numpy(source().classes_of(spec, 3))[:, :, None]).all()


@pytest.mark.parametrize("protocol", ["independent", "disjoint"])
def test_a_batch_says_the_class_of_each_sample(protocol: str) -> None:
    batch = loader(batch_size=2, protocol=protocol)[0]
    for (inputs, targets), classes in zip(
        (batch["train"], batch["test"]), batch["classes"], strict=True
    ):
        assert classes.dtype == torch.int64
        assert classes.shape == targets.shape
        assert torch.equal(classes, decoded(inputs)[..., 0].long())
    assert source().class_count() == len(COUNTS)


def test_reuse_counts_how_often_a_sample_is_drawn() -> None:
    episodes = disjoint(10, 20, ways=5, shots=1, test_shots=3)
    assert episodes.source.reuse(episodes.spec, 50) == pytest.approx(50 * 20 / 200)


@given(shapes, st.lists(st.integers(0, 2**40), min_size=1, max_size=6), st.integers(1, 4))
@settings(deadline=None)
def test_shards_make_the_stream_in_any_order(
    shape: dict[str, int], indices: list[int], shards: int
) -> None:
    stream = loader(**shape)
    whole = stream.source.batch(stream.spec, indices)
    for first in reversed(range(min(shards, len(indices)))):
        mine = indices[first::shards]
        part = loader(**shape).source.batch(stream.spec, mine)
        for place, at in enumerate(range(first, len(indices), shards)):
            assert equal(task(part, place), task(whole, at))


def test_disjoint_episodes_share_no_original_of_classes_made_from_the_same() -> None:
    # Four classes of each of six characters, as rotations are: the i-th samples are one drawing.
    characters, drawings, spec = 6, 20, EpisodeSpec("d", "test", 5, 1, 4, 0, "disjoint")
    count = 4 * characters
    source = ClassSource(
        torch.zeros(count * drawings, 1, dtype=torch.uint8),
        [drawings] * count,
        [f"class {i}" for i in range(count)],
        [*range(characters)] * 4,
    )
    episodes = source.episodes(spec)
    assert episodes == characters * (drawings // 5) // 5  # as many as there are hands for
    seen, owners = [], set()
    for index in range(episodes):
        samples, _ = source.indices(spec, index)
        classes = samples // drawings
        assert (classes == classes[:, :1]).all()
        assert len(set(classes[:, 0])) == 5
        owners |= set(classes[:, 0] // characters)
        seen += [
            (c % characters, d)
            for c, d in zip(classes.flat, (samples % drawings).flat, strict=True)
        ]
    assert len(set(seen)) == len(seen)
    assert owners == {0, 1, 2, 3}
    assert source.reuse(spec, episodes) == len(seen) / (characters * drawings)


def test_classes_of_the_same_originals_have_as_many() -> None:
    with pytest.raises(DatasetError, match="differ in how many"):
        ClassSource(torch.zeros(5, 1, dtype=torch.uint8), [2, 3], ["a", "b"], [0, 0])


def test_bytes_become_the_nearest_numbers_from_0_to_1() -> None:
    """Divided, not multiplied by a reciprocal: that would be off by a bit in 126 of them."""
    exact = torch.arange(256, dtype=torch.float64) / 255
    assert torch.equal(floats(torch.arange(256, dtype=torch.uint8)), exact.float())


def test_samples_that_are_no_bytes_are_refused() -> None:
    with pytest.raises(DatasetError, match=r"torch.float32; they must be torch.uint8"):
        ClassSource(torch.rand(4, 2), [2, 2], ["a", "b"])


def test_numpys_integers_are_integers() -> None:
    assert spec(shots=np.int64(1), seed=np.uint32(3)) == spec(shots=1, seed=3)
    assert spec(shots=np.int64(1)).address == spec(shots=1).address
    assert len(loader(batch_size=np.int64(2))[0]["train"][0]) == 2


@pytest.mark.parametrize("size", [0, 1.5, "4"])
def test_a_batch_size_that_is_none_is_refused(size: Any) -> None:
    with pytest.raises(DatasetError, match="batch_size"):
        loader(batch_size=size)
