"""Nothing of a task outlives it."""

import gc
import threading

import psutil
import pytest
import torch

import algorithms
from algorithms import kernels, models
from tests.algorithms import derivation


def live_tensors() -> int:
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("name", ["maml", "fomaml", "reptile", "anil"])
def test_no_tensor_is_left_by_an_iteration_even_before_a_collection(name: str) -> None:
    torch.manual_seed(0)
    model = derivation.Net().double()
    adam = {"inner_optimizer": "adam", "inner_lr": 0.01} if name == "reptile" else {}
    algorithm = algorithms.create(name, model, inner_steps=2, norm="running", **adam)
    batch = derivation.make_batch(tasks=2)
    gc.collect()
    gc.disable()  # what only a collection would free is a leak on a GPU all the same
    try:
        for _ in range(3):
            algorithm.meta_backward(batch)
            algorithm.evaluate(batch, 2)
        before = live_tensors()
        for _ in range(20):
            algorithm.meta_backward(batch)
            algorithm.evaluate(batch, 2)
        assert live_tensors() <= before
    finally:
        gc.enable()


def test_resident_memory_is_flat_over_thousands_of_iterations() -> None:
    model = models.build("mlp", (1,), 1, seed=0)
    maml = algorithms.create("maml", model, inner_lr=0.01)
    x = torch.linspace(-5, 5, 10).view(1, 10, 1)
    batch = {"train": (x, x.sin()), "test": (x, x.sin())}

    def run(iterations: int) -> int:
        for _ in range(iterations):
            maml.meta_backward(batch)
        return psutil.Process().memory_info().rss

    settled = run(500)
    assert run(2500) - settled < 4 * 2**20  # a task's graph is about 50 KiB: a leak is 125 MiB


def saved_bytes(steps: int) -> int:
    """Bytes that autograd holds for one task's meta-gradient at this many inner steps."""
    torch.manual_seed(0)
    model = derivation.Net().double()
    maml = algorithms.create("maml", model, inner_steps=steps)
    batch = derivation.make_batch(tasks=1)
    held: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tasks = algorithms.Tasks.of(batch, like=maml.parameters()[0])
        maml.inner_loop.train(True)
        fast = maml.adapt(tasks, create_graph=True)
    assert fast
    return sum(held.values())


def test_memory_grows_linearly_in_inner_steps() -> None:
    one, four, seven = (saved_bytes(steps) for steps in (2, 5, 8))
    assert seven - four == pytest.approx(four - one, rel=0.05)


@pytest.mark.skipif(bool(kernels.missing()), reason="the compiled kernels are not here")
def test_what_a_thread_computed_with_ends_with_it() -> None:
    model = models.build("conv4", (1, 28, 28), 5, seed=0)
    maml = algorithms.create("maml", model, inner_steps=1, engine="batched")
    images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).expand(2, -1)
    batch = {"train": (images, labels), "test": (images, labels)}

    def resident(threads: int) -> int:
        for _ in range(threads):
            one = threading.Thread(target=maml.evaluate, args=(batch, 1))
            one.start()
            one.join()
        return psutil.Process().memory_info().rss

    settled = resident(10)
    assert resident(100) - settled < 20 * 2**20  # each has a MiB to give back
