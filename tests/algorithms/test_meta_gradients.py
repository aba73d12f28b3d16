"""The meta-gradients are those of the papers, in float64 and to rounding."""

import pytest
import torch

import algorithms
from algorithms.normalisation import MODES
from tests.algorithms import derivation

ALGORITHMS = ("maml", "fomaml", "reptile", "anil", "pretrained")
LR = 0.3


def make_model() -> derivation.Net:
    torch.manual_seed(1)
    model = derivation.Net().double()
    for norm in (model.norm1, model.norm2):  # away from 1 and 0, where mistakes hide
        torch.nn.init.normal_(norm.weight, 1, 0.2)
        torch.nn.init.normal_(norm.bias, 0, 0.2)
    return model


def relative_error(found: dict, expected: dict) -> float:
    assert found.keys() == expected.keys()
    difference = sum((found[n] - expected[n]).norm() ** 2 for n in expected) ** 0.5
    return float(difference / sum(v.norm() ** 2 for v in expected.values()) ** 0.5)


def gradients(model: torch.nn.Module) -> dict:
    return {name: value.grad for name, value in model.named_parameters()}


@pytest.mark.parametrize("norm", MODES)
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_meta_gradient_equals_the_derivation(name: str, steps: int, norm: str) -> None:
    model, batch = make_model(), derivation.make_batch()
    expected = derivation.meta_gradient(name, model, batch, steps=steps, lr=LR, norm=norm)
    algorithm = algorithms.create(name, model, inner_lr=LR, inner_steps=steps, norm=norm)
    algorithm.meta_backward(batch)
    assert relative_error(gradients(model), expected) < 1e-10


@pytest.mark.parametrize("name", ALGORITHMS)
def test_meta_gradient_through_adam_equals_the_derivation(name: str) -> None:
    model, batch = make_model(), derivation.make_batch()
    settings = {"steps": 3, "lr": 0.01, "norm": "transductive", "optimizer": "adam"}
    expected = derivation.meta_gradient(name, model, batch, **settings)
    algorithms.create(
        name, model, inner_lr=0.01, inner_steps=3, inner_optimizer="adam"
    ).meta_backward(batch)
    assert relative_error(gradients(model), expected) < 1e-10


@pytest.mark.parametrize("norm", MODES)
def test_mamls_meta_gradient_equals_finite_differences(norm: str) -> None:
    model, batch = make_model(), derivation.make_batch()
    maml = algorithms.create("maml", model, inner_lr=LR, inner_steps=2, norm=norm)
    maml.meta_backward(batch)
    torch.manual_seed(3)
    direction = {n: torch.randn_like(v) for n, v in model.named_parameters()}
    predicted = sum((gradients(model)[n] * d).sum() for n, d in direction.items())

    def loss_at(distance: float) -> torch.Tensor:
        with torch.no_grad():
            for n, v in model.named_parameters():
                v += distance * direction[n]
        loss = maml.meta_backward(batch).loss.mean()
        with torch.no_grad():
            for n, v in model.named_parameters():
                v -= distance * direction[n]
        return loss

    h = 1e-5
    measured = (loss_at(h) - loss_at(-h)) / (2 * h)
    assert float(abs(measured - predicted) / abs(predicted)) < 1e-6


def test_first_order_gradient_is_not_mamls() -> None:
    model, batch = make_model(), derivation.make_batch()
    algorithms.create("maml", model, inner_lr=LR, inner_steps=1).meta_backward(batch)
    second_order = {n: g.clone() for n, g in gradients(model).items()}
    algorithms.create("fomaml", model, inner_lr=LR, inner_steps=1).meta_backward(batch)
    assert relative_error(gradients(model), second_order) > 0.01


def test_meta_backward_sets_the_mean_over_tasks_and_does_not_accumulate() -> None:
    model, batch = make_model(), derivation.make_batch(tasks=4)
    maml = algorithms.create("maml", model, inner_lr=LR)
    maml.meta_backward(batch)
    whole = {n: g.clone() for n, g in gradients(model).items()}
    mean = {n: torch.zeros_like(g) for n, g in whole.items()}
    for i in range(4):
        maml.meta_backward({k: (x[i : i + 1], y[i : i + 1]) for k, (x, y) in batch.items()})
        for n, g in gradients(model).items():
            mean[n] += g / 4
    assert relative_error(mean, whole) < 1e-12


def test_reptile_with_minibatches_takes_each_step_on_its_own_samples() -> None:
    model, batch = make_model(), derivation.make_batch(shots=4)
    reptile = algorithms.create("reptile", model, inner_lr=LR, inner_steps=5, inner_batch=5)
    torch.manual_seed(7)
    reptile.meta_backward(batch)
    torch.manual_seed(7)
    drawn = torch.stack([torch.cat([torch.randperm(12) for _ in range(3)])[:25] for _ in range(3)])
    expected = derivation.meta_gradient(
        "reptile",
        model,
        batch,
        steps=5,
        lr=LR,
        norm="transductive",
        minibatches=drawn.view(3, 5, 5),
    )
    assert relative_error(gradients(model), expected) < 1e-10


def test_inner_clip_bounds_every_element_of_the_inner_gradient() -> None:
    model, batch = make_model(), derivation.make_batch()
    clip = 1e-3
    theta = {n: v.detach().clone() for n, v in model.named_parameters()}
    reptile = algorithms.create("reptile", model, inner_lr=1.0, inner_steps=1, inner_clip=clip)
    reptile.meta_backward(batch)
    largest = max(float(g.abs().max()) for g in gradients(model).values())
    assert largest == pytest.approx(clip)
    assert all(torch.equal(v, theta[n]) for n, v in model.named_parameters())
