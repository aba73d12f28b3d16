"""Each batch-norm mode says whose statistics it uses, and uses those."""

import pytest
import torch
from torch import nn

import algorithms
from algorithms.normalisation import MODES
from tests.algorithms import derivation


def make(norm: str, **settings) -> algorithms.Algorithm:
    torch.manual_seed(1)
    return algorithms.create("maml", derivation.Net().double(), norm=norm, **settings)


def predictions(algorithm: algorithms.Algorithm, batch: dict) -> torch.Tensor:
    """Query losses one sample at a time would hide dependence, so look at the outputs."""
    tasks = algorithms.Tasks.of(batch, like=algorithm.parameters()[0])
    algorithm.inner_loop.train(False)
    (fast,) = algorithm.inner_loop.trajectory(tasks, 0, create_graph=False)
    return algorithm.inner_loop.query(fast, tasks)[0].detach()


@pytest.mark.parametrize(
    ("norm", "depends"),
    [("transductive", True), ("support", False), ("single", False), ("running", False)],
)
def test_whether_a_query_prediction_depends_on_the_other_queries(norm: str, depends: bool) -> None:
    algorithm, batch = make(norm), derivation.make_batch(tasks=1)
    before = predictions(algorithm, batch)[0]
    inputs = batch["test"][0].clone()
    inputs[:, 1:] += 1.0  # every query but the first
    after = predictions(algorithm, batch | {"test": (inputs, batch["test"][1])})[0]
    assert torch.allclose(before, after, atol=1e-12) is not depends


@pytest.mark.parametrize(
    ("norm", "depends"),
    [("transductive", False), ("support", True), ("single", True), ("running", False)],
)
def test_whether_a_query_prediction_depends_on_the_support_statistics(
    norm: str, depends: bool
) -> None:
    algorithm, batch = make(norm), derivation.make_batch(tasks=1)
    before = predictions(algorithm, batch)
    inputs, targets = batch["train"]
    after = predictions(algorithm, batch | {"train": (inputs + torch.randn_like(inputs), targets)})
    assert torch.allclose(before, after, atol=1e-12) is not depends


def test_single_mode_counts_the_query_sample_beside_the_support_set() -> None:
    algorithm, batch = make("single"), derivation.make_batch(tasks=1)
    model = algorithm.model.train()
    support, query = batch["train"][0][0], batch["test"][0][0]
    one_by_one = torch.stack([model(torch.cat([support, q[None]]))[-1] for q in query])
    assert torch.allclose(predictions(algorithm, batch), one_by_one, atol=1e-12)


@pytest.mark.parametrize("norm", MODES)
def test_evaluation_changes_neither_parameters_nor_buffers_nor_gradients(norm: str) -> None:
    algorithm, batch = make(norm), derivation.make_batch()
    algorithm.meta_backward(batch)
    state = {n: v.clone() for n, v in algorithm.model.state_dict().items()}
    gradients = [p.grad.clone() for p in algorithm.parameters()]
    algorithm.evaluate(batch, steps=3)
    assert all(torch.equal(v, state[n]) for n, v in algorithm.model.state_dict().items())
    for parameter, gradient in zip(algorithm.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_running_averages_are_gathered_in_meta_training_alone() -> None:
    algorithm, batch = make("running"), derivation.make_batch()
    model = algorithm.model
    for _ in range(200):
        algorithm.meta_backward(batch)  # the parameters stay, so the averages settle
    # What settles is the mean over the meta-step's forward passes: supports at theta, queries at
    # theta'. The first layer sees both; derive its mean again, by hand, at one inner step.
    expected = torch.zeros(4, dtype=torch.float64)
    theta = {n: v.detach().clone().requires_grad_() for n, v in model.named_parameters()}
    for i in range(3):
        (xs, ys), xq = (batch["train"][0][i], batch["train"][1][i]), batch["test"][0][i]
        fast = derivation.inner(
            theta,
            (xs, ys),
            list(theta),
            steps=1,
            lr=algorithm.inner_lr,
            optimizer="sgd",
            create_graph=False,
        )
        for x, p in ((xs, theta), (xq, fast)):
            features = torch.nn.functional.conv2d(x, p["conv1.weight"], None, 2, 1)
            expected += features.mean((0, 2, 3)).detach() / 6
    assert torch.allclose(model.norm1.running_mean, expected, atol=1e-6)
    before = model.norm1.running_mean.clone()
    make("transductive").meta_backward(batch)
    algorithm.evaluate(batch)
    assert torch.equal(model.norm1.running_mean, before)


def test_running_mode_needs_a_model_that_keeps_averages() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3, track_running_stats=False)
    )
    with pytest.raises(algorithms.AlgorithmError, match="track_running_stats"):
        algorithms.create("maml", model, norm="running")


def test_the_users_model_keeps_its_own_layers() -> None:
    algorithm = make("support")
    assert type(algorithm.model.norm1) is torch.nn.BatchNorm2d
    outputs = algorithm.model.eval()(torch.zeros(2, 1, 8, 8, dtype=torch.float64))
    assert outputs.shape == (2, 3)


def data_norm(momentum: float | None) -> nn.Sequential:
    """Batch normalisation of the data themselves, whose statistics no weight changes."""
    return nn.Sequential(nn.BatchNorm1d(3, momentum=momentum), nn.Linear(3, 2))


def data_batch(seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2, 2, 4, 3, generator=generator) * 3 + 1
    labels = torch.tensor([0, 1, 0, 1]).expand(2, 4)
    return {"train": (inputs[0], labels), "test": (inputs[1], labels)}


def noted(batch: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """What one meta-step of one inner step sees: each task's support set and its query set."""
    sets = torch.cat([batch["train"][0], batch["test"][0]])
    return [sets.mean(1).mean(0), sets.var(1).mean(0)]


@pytest.mark.parametrize("engine", ["higher", "batched"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_averages_move_by_the_mean_of_what_a_meta_step_saw(
    engine: str, momentum: float | None
) -> None:
    model = data_norm(momentum)
    maml = algorithms.create("maml", model, norm="running", engine=engine)
    expected = [torch.zeros(3), torch.ones(3)]
    for step in (1, 2, 3):
        batch = data_batch(step)
        maml.meta_backward(batch)
        share = 1 / step if momentum is None else momentum
        seen = zip(expected, noted(batch), strict=True)
        expected = [(1 - share) * before + share * now for before, now in seen]
        assert torch.allclose(model[0].running_mean, expected[0], atol=1e-6)
        assert torch.allclose(model[0].running_var, expected[1], atol=1e-6)
    assert model[0].num_batches_tracked == 3


@pytest.mark.parametrize("engine", ["higher", "batched"])
@pytest.mark.parametrize("norm", [mode for mode in MODES if mode != "running"])
def test_other_modes_leave_the_running_averages_alone(engine: str, norm: str) -> None:
    model = data_norm(0.1)
    maml = algorithms.create("maml", model, norm=norm, engine=engine)
    maml.meta_backward(data_batch(0))
    assert torch.equal(model[0].running_mean, torch.zeros(3))
    assert torch.equal(model[0].running_var, torch.ones(3))
    assert model[0].num_batches_tracked == 0
    assert not any(layer.averages.noted for layer in maml.inner_loop.norm.layers)
