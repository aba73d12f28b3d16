"""The contract of an algorithm, and its registry."""

import pytest
import torch
from torch import nn

import algorithms
from algorithms import AlgorithmError, head_names, models
from tests.algorithms import derivation

ALGORITHMS = ("maml", "fomaml", "reptile", "anil")


def make(name: str = "maml", **settings) -> algorithms.Algorithm:
    torch.manual_seed(0)
    return algorithms.create(name, derivation.Net().double(), **settings)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_scores_are_detached_and_shaped_by_tasks_and_steps(name: str) -> None:
    algorithm, batch = make(name), derivation.make_batch(tasks=4)
    step = algorithm.meta_backward(batch)
    scores = algorithm.evaluate(batch, steps=3)
    assert step.loss.shape == step.metric.shape == (4,)
    assert scores.loss.shape == scores.metric.shape == (4, 4)
    assert not any(t.requires_grad for t in (step.loss, step.metric, scores.loss, scores.metric))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_evaluation_does_not_depend_on_how_tasks_are_batched(name: str) -> None:
    algorithm = make(name, inner_lr=0.05, inner_steps=3, eval_batch=2)
    batch = derivation.make_batch(tasks=3)
    whole = algorithm.evaluate(batch)
    for i in range(3):
        one = algorithm.evaluate({k: (x[i : i + 1], y[i : i + 1]) for k, (x, y) in batch.items()})
        assert torch.allclose(one.loss[0], whole.loss[i], rtol=1e-12)


def test_inner_steps_lower_the_query_loss() -> None:
    scores = make(inner_lr=0.1).evaluate(derivation.make_batch(tasks=8), steps=5)
    means = scores.loss.mean(0)
    assert (means[1:] < means[:-1]).all()


def test_evaluation_works_under_no_grad() -> None:
    algorithm, batch = make(), derivation.make_batch()
    with torch.no_grad():
        inside = algorithm.evaluate(batch, 2)
    assert torch.equal(inside.loss, algorithm.evaluate(batch, 2).loss)


def test_the_outer_optimizer_trains_the_users_model() -> None:
    algorithm, batch = make(inner_lr=0.05), derivation.make_batch(tasks=4)
    optimizer = torch.optim.Adam(algorithm.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        losses.append(float(algorithm.meta_backward(batch).loss.mean()))
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_anil_adapts_the_head_alone() -> None:
    anil = make("anil")
    assert anil.adapted() == ["head.weight", "head.bias"]
    anil.meta_backward(derivation.make_batch())
    assert all(p.grad.abs().sum() > 0 for p in anil.parameters())


def test_the_head_is_the_attribute_or_else_the_last_module_with_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.Identity())
    assert head_names(model) == ["2.weight", "2.bias"]
    named = nn.Module()
    named.head, named.after = nn.Linear(2, 2), nn.Linear(2, 2)
    assert head_names(named) == ["head.weight", "head.bias"]


def test_regression_tasks_are_scored_by_squared_error() -> None:
    torch.manual_seed(0)
    model = nn.Linear(1, 1).double()
    x = torch.randn(2, 5, 1, dtype=torch.float64)
    y = 3 * x
    scores = algorithms.create("maml", model, inner_lr=0.1).evaluate(
        {"train": (x, y), "test": (x, y)}, 0
    )
    expected = ((model(x) - y) ** 2).mean((1, 2)).detach()
    assert torch.allclose(scores.loss[:, 0], expected)
    assert torch.equal(scores.loss, scores.metric)


def test_frozen_parameters_are_neither_learned_nor_adapted() -> None:
    model = derivation.Net().double()
    model.conv1.weight.requires_grad_(False)
    maml = algorithms.create("maml", model)
    maml.meta_backward(derivation.make_batch())
    assert model.conv1.weight.grad is None
    assert len(maml.parameters()) == len(list(model.parameters())) - 1


def test_a_parameter_used_twice_is_one_meta_parameter() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 3)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.tanh(self.first(x)))

    torch.manual_seed(0)
    model = Tied().double()
    x, y = torch.randn(1, 6, 3, dtype=torch.float64), torch.arange(6)[None] % 3
    maml = algorithms.create("maml", model, inner_lr=0.1)
    maml.meta_backward({"train": (x, y), "test": (x, y)})
    assert len(maml.parameters()) == 3
    theta = dict(model.named_parameters())
    loss = nn.functional.cross_entropy(model(x[0]), y[0])
    stepped = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
    fast = {n: v - 0.1 * g for (n, v), g in zip(theta.items(), stepped, strict=True)}
    hidden = torch.tanh(x[0] @ fast["first.weight"].T + fast["first.bias"])
    outputs = hidden @ fast["first.weight"].T + fast["second.bias"]
    expected = torch.autograd.grad(nn.functional.cross_entropy(outputs, y[0]), list(theta.values()))
    for parameter, gradient in zip(maml.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner_lr": 0}, "inner_lr is 0; it must be positive"),
        ({"inner_lr": float("nan")}, "inner_lr"),
        ({"inner_steps": 0}, "inner_steps"),
        ({"norm": "batch"}, "norm is 'batch'; it must be one of transductive"),
        ({"engine": "jax"}, "engine is 'jax'"),
        ({"inner_optimizer": "adamw"}, "inner_optimizer is 'adamw'"),
        ({"inner_rate": 1}, "maml has no 'inner_rate'; it has inner_lr"),
    ],
)
def test_a_bad_setting_is_named_with_what_would_do(settings: dict, message: str) -> None:
    with pytest.raises(AlgorithmError, match=message):
        make(**settings)


def test_an_unknown_algorithm_is_answered_with_the_nearest() -> None:
    with pytest.raises(AlgorithmError, match="did you mean 'maml'"):
        algorithms.get("mamll")


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(AlgorithmError, match="no parameters"):
        algorithms.create("maml", nn.ReLU())


def test_two_classes_cannot_share_a_name() -> None:
    with pytest.raises(AlgorithmError, match="two algorithms are called 'maml'"):

        @algorithms.register("maml")
        class Another(algorithms.get("fomaml")):
            pass


def test_regression_targets_of_another_shape_are_refused() -> None:
    model = torch.nn.Linear(1, 1)
    x = torch.randn(2, 5, 1)
    batch = {"train": (x, x[..., 0]), "test": (x, x[..., 0])}
    for engine in ("higher", "batched"):
        maml = algorithms.create("maml", model, engine=engine)
        with pytest.raises(ValueError, match=r"outputs of \(5, 1\) and targets of \(5,\)"):
            maml.meta_backward(batch)


@pytest.mark.parametrize("engine", ["higher", "batched"])
def test_reptile_learns_what_others_learn_outside_alone(engine: str) -> None:
    model = models.build("conv4", (1, 8, 8), 3, seed=0)
    assert model.outer_only
    x, y = torch.randn(2, 6, 1, 8, 8), torch.arange(3).repeat(2, 2)
    reptile = algorithms.create("reptile", model, engine=engine)
    reptile.meta_backward({"train": (x, y), "test": (x, y)})
    assert all(model.get_parameter(name).grad.any() for name in model.outer_only)


def test_an_inner_gradient_is_clipped_and_then_directed() -> None:
    class Amplified(algorithms.get("maml")):  # type: ignore[misc]
        summary = "ten times the gradient"

        def direction(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
            return 10 * gradient

    batch = derivation.make_batch()
    for engine in ("higher", "batched"):
        torch.manual_seed(0)
        model = derivation.Net().double()
        maml = Amplified(model, inner_lr=1.0, inner_clip=1e-3, engine=engine)
        tasks = maml._tasks(batch, None, 1)
        maml._prepare(tasks)
        first = next(iter(tasks.split(maml.inner_loop.tasks_per_pass)))
        before, after = maml.inner_loop.trajectory(first, 1, create_graph=False)
        moved = torch.stack([(after[n] - before[n]).abs().max() for n in maml.adapted()])
        assert moved.max().item() == pytest.approx(1e-2)


@pytest.mark.parametrize("engine", ["higher", "batched"])
def test_an_evaluation_takes_the_mini_batches_of_its_own_size(engine: str) -> None:
    """Of one support sample a step, in the order of one shuffle: each is descended once."""
    inputs = torch.eye(2).expand(1, 2, 2)
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    nn.init.zeros_(model[0].weight)
    targets = torch.ones(1, 2, 1)
    settings = {"inner_lr": 0.5, "engine": engine, "inner_steps": 2, "eval_batch": 1}
    maml = algorithms.create("maml", model, **settings)
    errors = maml.evaluate({"train": (inputs, targets), "test": (inputs, targets)}).metric
    # A step on one sample's squared error takes its own prediction from 0 to 1 and no other's.
    assert errors[0].tolist() == pytest.approx([1.0, 0.5, 0.0])
