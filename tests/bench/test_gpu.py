"""Every path that runs on an accelerator; ``make gpu-check`` runs these where there is one."""

from pathlib import Path

import pandas as pd
import pytest
import torch

import algorithms
import datasets
from algorithms import models
from algorithms.maml import MAML
from bench import measure
from bench.sweep import Cell
from tests.algorithms import derivation
from tests.algorithms.test_cuda_graphs import Asking
from tests.bench.conftest import QUICK, TINY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; make gpu-check"),
]


@pytest.mark.parametrize("engine", ["higher", "batched"])
@pytest.mark.parametrize("name", ["maml", "fomaml", "reptile", "anil"])
def test_meta_gradient_on_the_gpu_equals_the_derivation(name: str, engine: str) -> None:
    torch.manual_seed(1)
    model, batch = derivation.Net().double(), derivation.make_batch()
    settings = {"steps": 2, "lr": 0.3, "norm": "transductive"}
    expected = derivation.meta_gradient(name, model, batch, **settings)
    model.cuda()
    algorithm = algorithms.create(name, model, inner_lr=0.3, inner_steps=2, engine=engine)
    algorithm.meta_backward(batch)
    for parameter, value in model.named_parameters():
        assert torch.allclose(value.grad.cpu(), expected[parameter], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("engine", ["higher", "batched"])
@pytest.mark.parametrize("name", ["maml", "fomaml", "anil", "cavia", "imaml"])
def test_a_training_from_cuda_graphs_is_the_one_without(name: str, engine: str) -> None:
    found = []
    for graphs in (False, True):
        torch.manual_seed(1)
        model = derivation.Net().double().cuda()
        settings = {"inner_lr": 0.3, "inner_steps": 2, "engine": engine, "cuda_graphs": graphs}
        algorithm = algorithms.create(name, model, **settings)
        optimizer = torch.optim.Adam(algorithm.parameters(), lr=0.01)
        for seed in range(5):
            batch = derivation.make_batch(seed=seed)
            scores = algorithm.meta_backward(batch)
            found.append((scores.loss.cpu(), algorithm.evaluate(batch, 3).loss.cpu()))
            optimizer.step()
    for plain, recorded in zip(found[:5], found[5:], strict=True):
        for expected, value in zip(plain, recorded, strict=True):
            assert torch.allclose(expected, value, rtol=1e-7)


def test_after_a_step_that_cannot_be_recorded_others_can() -> None:
    batch = derivation.make_batch()
    for algorithm, recordable in ((MAML, True), (Asking, False), (MAML, True)):
        made = algorithm(derivation.Net().double().cuda(), cuda_graphs=True)
        if recordable:
            assert made.meta_backward(batch).loss.isfinite().all()
        else:
            with pytest.raises(algorithms.AlgorithmError, match="asking cannot be recorded"):
                made.meta_backward(batch)


def test_episodes_are_the_same_on_every_device() -> None:
    on = [datasets.loader("glyphs", batch_size=3, device=device)[2] for device in ("cpu", "cuda:0")]
    for half in ("train", "test"):
        for here, there in zip(on[0][half], on[1][half], strict=True):
            assert torch.equal(here, there.cpu())


def test_time_memory_and_flops_are_measured(cell: Cell) -> None:
    (found,) = measure.measure([cell.model_copy(update={"device": "cuda:0"})], plugin=TINY)
    assert (found[["seconds", "wall_seconds", "peak_bytes", "reserved_bytes"]] > 0).all(axis=None)
    assert (found["peak_bytes"] <= found["reserved_bytes"]).all()


def test_peak_memory_is_the_allocators() -> None:
    meter = measure.meter_for("cuda:0")
    meter.start()
    held = torch.ones(64 * 2**20, device="cuda:0")
    assert meter.stop()["peak_bytes"] >= held.numel() * 4


def test_a_sweep_over_both_devices(bench, fresh_processes, tmp_path: Path) -> None:
    status, out, _ = bench(
        "run", "--algos", "maml", *QUICK, "--devices", "cpu,cuda:0", "--out", "r"
    )
    print(out)
    assert status == 0
    summary = pd.read_csv(tmp_path / "r" / "summary.csv").set_index("device")
    assert summary["status"].eq("complete").all()
    assert abs(summary["mean"].diff().iloc[-1]) < 0.15


def test_a_run_by_cuda_graphs(bench, fresh_processes, tmp_path: Path) -> None:
    status, out, _ = bench(
        "run", "--algos", "maml", *QUICK, "--devices", "cuda:0", "--set", "cuda_graphs=true,false",
        "--out", "r",
    )  # fmt: skip
    print(out)
    assert status == 0
    summary = pd.read_csv(tmp_path / "r" / "summary.csv")
    assert summary["status"].eq("complete").all()
    assert abs(summary["mean"].diff().iloc[-1]) < 0.15


def test_memory_is_flat_over_many_meta_steps() -> None:
    model = models.build("conv4", (1, 28, 28), 5, seed=0).cuda()
    maml = algorithms.create("maml", model)
    batches = datasets.loader("glyphs", batch_size=4, test_shots=5, device="cuda:0")
    for index in range(5):
        maml.meta_backward(batches[index])
    before = torch.cuda.memory_allocated()
    for index in range(50):
        maml.meta_backward(batches[index])
    assert torch.cuda.memory_allocated() <= before
