"""It learns: short forms of the results that the documentation quotes in full."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import algorithms
import datasets
from algorithms import models
from bench.protocol import after_last_step, evaluate
from bench.sweep import Cell, Sweep
from bench.training import train
from datasets import EpisodeSpec

OMNIGLOT = Path(os.environ.get("BENCH_DATA", "nowhere")) / "omniglot" / "images_background.zip"


def only_cell(**asked) -> Cell:
    (cell,) = Sweep(devices=["cpu"], **asked).cells()
    return cell


def errors_by_step(algorithm: algorithms.Algorithm) -> list[float]:
    source = datasets.get("sinusoid")().load("test")
    spec = EpisodeSpec("sinusoid", "test", 1, 10, 20, 0)
    found = evaluate(algorithm, source, spec, episodes=100, steps=10)
    return found.groupby("step")["metric"].mean().tolist()


def test_maml_adapts_to_new_sinusoids_and_a_network_trained_without_it_does_not(
    tmp_path: Path,
) -> None:
    cell = only_cell(
        algos=["maml"], datasets=["sinusoid"], shots=[10], iterations=1000, val_every=1000
    )
    source = datasets.get("sinusoid")().load("train")
    maml, _ = train(cell, source, None, tmp_path / "state")
    error = errors_by_step(maml)
    assert error[0] > error[1] > error[10]  # in between, one trained for a single step may sway
    assert error[10] < 0.5 * error[0]

    # The same network on the same points of the same functions, as one regression problem.
    pooled = models.build("mlp", (1,), 1, seed=0)
    optimizer = torch.optim.Adam(pooled.parameters(), lr=1e-3)
    batches = datasets.loader("sinusoid", shots=10, test_shots=10, batch_size=25, seed=1)
    for index in range(1000):
        x, y = (torch.cat(parts, 1) for parts in zip(*batches[index].values(), strict=True))
        optimizer.zero_grad()
        nn.functional.mse_loss(pooled(x.flatten(0, 1)), y.flatten(0, 1)).backward()
        optimizer.step()
    without = errors_by_step(algorithms.create("maml", pooled, inner_lr=0.01))
    assert without[10] > 0.5 * without[0]
    assert without[10] > 2.5 * error[10]


@pytest.mark.skipif(
    not OMNIGLOT.exists(), reason="needs Omniglot's archives in $BENCH_DATA/omniglot"
)
def test_maml_learns_to_tell_new_omniglot_characters_apart(tmp_path: Path) -> None:
    cell = only_cell(
        algos=["maml"], datasets=["omniglot"], iterations=60, meta_batch=16, test_shots=1
    )
    dataset = datasets.get("omniglot")()
    maml, _ = train(cell, dataset.load("train"), None, tmp_path / "state")
    scores = evaluate(maml, dataset.load("test"), cell.test_spec, 100, 3)
    assert after_last_step(scores).mean() > 0.5


@pytest.mark.parametrize("name", ["maml", "fomaml", "anil", "reptile", "boil", "protonet"])
def test_every_algorithm_learns_glyphs_it_has_not_seen(name: str, tmp_path: Path) -> None:
    cell = only_cell(algos=[name], iterations=30)
    dataset = datasets.get("glyphs")()
    algorithm, _ = train(cell, dataset.load("train"), None, tmp_path / "state")
    scores = evaluate(algorithm, dataset.load("test"), cell.test_spec, 40, cell.eval_steps)
    assert after_last_step(scores).mean() > 0.4
