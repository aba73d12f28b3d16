"""What a meta-step, an adaptation and an episode cost: ``make bench``, which compares with the
costs it saved before.

The file's name keeps these out of ``make test``. Each group of pytest-benchmark's table has the
algorithms side by side.
"""

import pytest
import torch

import algorithms
import datasets
from algorithms import Algorithm, AlgorithmError
from bench.sweep import Cell, Sweep
from bench.training import build
from datasets import EpisodeLoader, EpisodeSpec

ENGINES = ["batched", "higher"]
EVERY_ALGORITHM = pytest.mark.parametrize("name", algorithms.names())
EVERY_ENGINE = pytest.mark.parametrize("engine", ENGINES)
TASKS, STEPS = 4, 3
ROUNDS = {"rounds": 10, "warmup_rounds": 2}


@pytest.fixture(scope="module")
def source() -> datasets.Source:
    torch.set_num_threads(1)
    return datasets.get("glyphs")().load("train")


def cell_of(name: str, engine: str = "auto") -> Cell:
    (cell,) = Sweep(algos=[name], datasets=["glyphs"], devices=["cpu"], engine=engine).cells()
    return cell


def episodes(cell: Cell, source: datasets.Source, shots: int) -> EpisodeLoader:
    spec = EpisodeSpec(cell.dataset, "train", cell.ways, shots, cell.test_shots, 0)
    return EpisodeLoader(source, spec, TASKS)


def algorithm_of(cell: Cell, source: datasets.Source) -> Algorithm:
    try:
        return build(cell, source)
    except AlgorithmError as error:
        pytest.skip(str(error))


@pytest.mark.benchmark(group=f"meta-step, {TASKS} tasks of glyphs 5-way")
@EVERY_ENGINE
@EVERY_ALGORITHM
def test_meta_step(benchmark, source, name: str, engine: str) -> None:
    cell = cell_of(name, engine)
    algorithm = algorithm_of(cell, source)
    batch = episodes(cell, source, cell.train_shots)[0]
    step = benchmark.pedantic(algorithm.meta_backward, args=(batch,), **ROUNDS)
    assert step.loss.isfinite().all()


@pytest.mark.benchmark(group=f"adaptation, {STEPS} steps on {TASKS} tasks of glyphs 5-way 1-shot")
@EVERY_ENGINE
@EVERY_ALGORITHM
def test_adaptation(benchmark, source, name: str, engine: str) -> None:
    cell = cell_of(name, engine)
    algorithm = algorithm_of(cell, source)
    batch = episodes(cell, source, cell.shots)[0]
    scores = benchmark.pedantic(algorithm.evaluate, args=(batch, STEPS), **ROUNDS)
    assert scores.loss.shape == (TASKS, STEPS + 1)


@pytest.mark.benchmark(group=f"sampling, {TASKS} episodes of glyphs 5-way")
@pytest.mark.parametrize("shots", [1, 5])
def test_sampling(benchmark, source, shots: int) -> None:
    loader = episodes(cell_of("maml"), source, shots)
    batch = benchmark(lambda: loader[7])
    assert batch["train"][0].shape[:2] == (TASKS, 5 * shots)
