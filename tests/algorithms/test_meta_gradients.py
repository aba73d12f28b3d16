"""The meta-gradients are those of the papers, in float64 and to rounding."""

import copy

import pytest
import torch
from torch import nn

import algorithms
from algorithms.imaml import conjugate_gradient
from algorithms.normalisation import MODES
from tests.algorithms import derivation

ALGORITHMS = ("maml", "fomaml", "reptile", "anil", "boil", "pretrained")
ENGINES = ("higher", "batched")
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


class PlainAdam:
    """Adam with beta1 = 0 as TensorFlow, which Reptile's code runs on, has it: it knows nothing of
    tasks, and goes on."""

    def __init__(self, model: nn.Module) -> None:
        self.squares = {name: torch.zeros_like(v) for name, v in model.named_parameters()}
        self.steps = 0

    def descend(self, model: nn.Module, task: int, batch: dict, steps: int) -> None:
        """Take steps on a task's support set."""
        inputs, targets = (half[task] for half in batch["train"])
        for _ in range(steps):
            loss = nn.functional.cross_entropy(model(inputs), targets)
            found = torch.autograd.grad(loss, list(model.parameters()))
            self.steps += 1
            size = 0.01 * (1 - 0.999**self.steps) ** 0.5
            with torch.no_grad():
                for (name, value), g in zip(model.named_parameters(), found, strict=True):
                    self.squares[name] = 0.999 * self.squares[name] + 0.001 * g**2
                    value -= size * g / (self.squares[name].sqrt() + 1e-8)


def keeping(model: nn.Module, engine: str) -> algorithms.Algorithm:
    adam = {"inner_optimizer": "adam", "inner_lr": 0.01, "inner_steps": 3}
    return algorithms.create("reptile", model, engine=engine, keep_moments=True, **adam)


@pytest.mark.parametrize("engine", ENGINES)
def test_reptiles_adam_goes_on_from_task_to_task_as_its_codes_does(engine: str) -> None:
    """One task a meta-step, so that the tasks follow one another as in the paper's code."""
    model, batch = make_model(), derivation.make_batch()
    plain, evaluated = copy.deepcopy(model), copy.deepcopy(model)
    reptile, adam = keeping(model, engine), PlainAdam(plain)
    for task in (0, 1, 2, 1, 0):
        reptile.meta_backward(
            {k: (x[task : task + 1], y[task : task + 1]) for k, (x, y) in batch.items()}
        )
        begun = copy.deepcopy(plain.state_dict())
        adam.descend(plain, task, batch, steps=3)
        with torch.no_grad():
            for value in model.parameters():
                value -= 0.5 * value.grad  # the outer step
            for name, value in plain.named_parameters():
                value.copy_(begun[name] + 0.5 * (value - begun[name]))
        found, expected = (
            {name: value.detach() for name, value in each.named_parameters()}
            for each in (model, plain)
        )
        assert relative_error(found, expected) < 1e-10
    for name, square in adam.squares.items():
        assert torch.allclose(reptile.carried[name], square, rtol=1e-10)

    # An evaluation begins with the moments of training, and leaves them as they were.
    before = copy.deepcopy(reptile.carried)
    scores = reptile.evaluate(batch, 3)
    for task in range(3):
        evaluated.load_state_dict(plain.state_dict())
        copy.deepcopy(adam).descend(evaluated, task, batch, steps=3)
        inputs, targets = (half[task] for half in batch["test"])
        loss = nn.functional.cross_entropy(evaluated(inputs), targets)
        assert float(scores.loss[task, 3]) == pytest.approx(loss.item(), rel=1e-9)
    assert all(torch.equal(value, before[name]) for name, value in reptile.carried.items())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tasks_per_pass", [None, 2])
def test_moments_that_are_kept_are_the_mean_over_tasks(engine: str, tasks_per_pass) -> None:
    model, batch = make_model(), derivation.make_batch()
    reptile = keeping(model, engine)
    if engine == "batched":
        reptile.inner_loop.most_tasks = tasks_per_pass
    reptile.meta_backward(batch)
    ends = []
    for task in range(3):
        plain = copy.deepcopy(model)
        adam = PlainAdam(plain)
        adam.descend(plain, task, batch, steps=3)
        ends.append(adam.squares)
    for name in ends[0]:
        mean = torch.stack([squares[name] for squares in ends]).mean(0)
        assert torch.allclose(reptile.carried[name], mean, rtol=1e-10)
    again = keeping(copy.deepcopy(model), engine)
    again.load_state_dict(reptile.state_dict())
    assert all(torch.equal(again.carried[name], v) for name, v in reptile.carried.items())
    assert again.carried.keys() == reptile.carried.keys()
    assert float(again.moments().mass) == pytest.approx(1 - 0.999**3)


def test_plain_descent_has_no_moments_to_keep() -> None:
    reptile = algorithms.create("reptile", make_model(), keep_moments=True)
    reptile.meta_backward(derivation.make_batch())
    assert not reptile.carried
    assert not any("reptile/" in name for name in reptile.state_dict())


def test_inner_clip_bounds_every_element_of_the_inner_gradient() -> None:
    model, batch = make_model(), derivation.make_batch()
    clip = 1e-3
    theta = {n: v.detach().clone() for n, v in model.named_parameters()}
    reptile = algorithms.create("reptile", model, inner_lr=1.0, inner_steps=1, inner_clip=clip)
    reptile.meta_backward(batch)
    largest = max(float(g.abs().max()) for g in gradients(model).values())
    assert largest == pytest.approx(clip)
    assert all(torch.equal(v, theta[n]) for n, v in model.named_parameters())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("norm", MODES)
def test_prototypical_networks_gradient_equals_the_derivation(norm: str, engine: str) -> None:
    model, batch = make_model(), derivation.make_batch()
    expected = derivation.prototype_gradient(model, batch, norm=norm)
    protonet = algorithms.create("protonet", model, norm=norm, engine=engine)
    protonet.meta_backward(batch)
    found = {n: p.grad for n, p in protonet.meta_parameters.items()}
    assert relative_error(found, expected) < 1e-10
    assert model.head.weight.grad is None


def make_batch_with_classes(classes: int = 7) -> dict:
    """Samples of one class share a number; which class a label is differs between tasks."""
    batch = derivation.make_batch()
    g = torch.Generator().manual_seed(5)
    of_label = torch.stack([torch.randperm(classes, generator=g)[:3] for _ in range(3)])
    batch["classes"] = tuple(of_label.gather(1, batch[half][1]) for half in ("train", "test"))
    return batch


BASELINES = pytest.mark.parametrize(
    ("name", "own"), [("finetune", {}), ("finetune_pp", {"scale": 3.0})]
)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("norm", MODES)
@BASELINES
def test_pre_trainings_gradient_equals_the_derivation(
    name: str, own: dict, norm: str, engine: str
) -> None:
    model, batch = make_model(), make_batch_with_classes()
    baseline = algorithms.create(name, model, train_classes=7, norm=norm, engine=engine, **own)
    away_from_their_start(baseline.beside)
    classifier = {n.removeprefix("classifier."): v for n, v in baseline.beside.items()}
    expected = derivation.pretraining_gradient(
        model, batch, classifier, scale=own.get("scale"), norm=norm
    )
    baseline.meta_backward(batch)
    found = {n: p.grad for n, p in baseline.meta_parameters.items()}
    assert relative_error(found, expected[0]) < 1e-10
    assert relative_error({n: p.grad for n, p in classifier.items()}, expected[1]) < 1e-10


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("norm", ["transductive", "support", "single"])
@BASELINES
def test_a_new_head_is_trained_on_frozen_features(
    name: str, own: dict, norm: str, engine: str
) -> None:
    model, batch = make_model(), derivation.make_batch()
    settings = {"inner_lr": LR, "norm": norm, "engine": engine, **own}
    baseline = algorithms.create(name, model, train_classes=7, **settings)
    expected = derivation.new_heads_losses(
        model, batch, scale=own.get("scale"), steps=4, lr=LR, norm=norm
    )
    found = baseline.evaluate(batch, 4).loss
    assert torch.allclose(found, expected, rtol=1e-10, atol=0)


def away_from_their_start(learned: dict) -> None:
    """Step sizes that all differ, some of them negative."""
    torch.manual_seed(4)
    with torch.no_grad():
        for value in learned.values():
            value.add_(0.1 * torch.randn_like(value))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("norm", MODES)
def test_meta_sgds_gradient_equals_the_derivation(norm: str, engine: str) -> None:
    model, batch = make_model(), derivation.make_batch()
    settings = {"inner_lr": LR, "inner_steps": 2, "norm": norm, "engine": engine}
    algorithm = algorithms.create("meta_sgd", model, **settings)
    away_from_their_start(algorithm.beside)
    alpha = {n: algorithm.beside[f"alpha.{n}"].detach() for n in algorithm.meta_parameters}
    expected, by_rate = derivation.rated_gradient(
        model, batch, {n: torch.stack([v, v]) for n, v in alpha.items()}, weights=[0, 1], norm=norm
    )
    algorithm.meta_backward(batch)
    assert relative_error(gradients(model), expected) < 1e-10
    found = {n: algorithm.beside[f"alpha.{n}"].grad for n in alpha}
    assert relative_error(found, {n: g.sum(0) for n, g in by_rate.items()}) < 1e-10


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("norm", MODES)
def test_metacurvatures_gradient_equals_the_derivation(norm: str, engine: str) -> None:
    model, batch = make_model(), derivation.make_batch()
    settings = {"inner_lr": LR, "inner_steps": 2, "norm": norm, "engine": engine}
    algorithm = algorithms.create("metacurvature", model, **settings)
    away_from_their_start(algorithm.beside)
    names = {"conv1.weight": 3, "conv2.weight": 3, "head.weight": 2}
    of = {
        name: [f"curvature.{name}.{mode}" for mode in range(names.get(name, 1))]
        for name in algorithm.meta_parameters
    }
    assert [key for keys in of.values() for key in keys] == list(algorithm.beside)
    expected, by_map = derivation.curved_gradient(
        model,
        batch,
        {name: [algorithm.beside[key] for key in keys] for name, keys in of.items()},
        steps=2,
        lr=LR,
        norm=norm,
    )
    algorithm.meta_backward(batch)
    assert relative_error(gradients(model), expected) < 1e-10
    for name, keys in of.items():
        for key, matrix in zip(keys, by_map[name], strict=True):
            assert relative_error({"": algorithm.beside[key].grad}, {"": matrix}) < 1e-10


@pytest.mark.parametrize("engine", ENGINES)
def test_metacurvature_begins_as_maml(engine: str) -> None:
    model, batch = make_model(), derivation.make_batch()
    settings = {"inner_lr": LR, "inner_steps": 2, "engine": engine}
    algorithms.create("metacurvature", model, **settings).meta_backward(batch)
    found = {n: g.clone() for n, g in gradients(model).items()}
    algorithms.create("maml", model, **settings).meta_backward(batch)
    assert relative_error(found, gradients(model)) < 1e-12


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("norm", MODES)
@pytest.mark.parametrize(
    ("progress", "weights", "first_order"),
    [
        (0.0, [1 / 3, 1 / 3, 1 / 3], True),
        (0.3, [1 / 12, 1 / 12, 5 / 6], True),
        (0.6, [0, 0, 1], False),
        (1.0, [0, 0, 1], False),
    ],
)
def test_maml_pps_gradient_equals_the_derivation(
    progress: float, weights: list, first_order: bool, norm: str, engine: str
) -> None:
    model, batch = make_model(), derivation.make_batch()
    algorithm = algorithms.create(
        "maml_pp",
        model,
        inner_lr=LR,
        inner_steps=3,
        multi_step_until=0.4,
        norm=norm,
        engine=engine,
    )
    algorithm.progress = progress
    assert algorithm.step_weights() == pytest.approx(weights)
    away_from_their_start(algorithm.beside)
    rates = {n: algorithm.beside[f"rates.{n}"].detach() for n in algorithm.meta_parameters}
    expected, by_rate = derivation.rated_gradient(
        model, batch, rates, weights=weights, norm=norm, first_order=first_order
    )
    algorithm.meta_backward(batch)
    assert relative_error(gradients(model), expected) < 1e-10
    found = {n: algorithm.beside[f"rates.{n}"].grad for n in rates}
    assert relative_error(found, by_rate) < 1e-10


@pytest.mark.parametrize("engine", ENGINES)
def test_maml_pp_is_maml_where_all_is_annealed_and_first_order_maml_before(engine: str) -> None:
    model, batch = make_model(), derivation.make_batch()
    settings = {"inner_steps": 2, "inner_lr": LR, "engine": engine, "multi_step_until": 0}
    algorithm = algorithms.create("maml_pp", model, **settings)
    algorithm.meta_backward(batch)
    second = {n: g.clone() for n, g in gradients(model).items()}
    algorithms.create("maml", model, inner_lr=LR, inner_steps=2).meta_backward(batch)
    assert relative_error(second, gradients(model)) < 1e-10  # all rates are still inner_lr
    algorithm.progress = 0.0
    algorithm.meta_backward(batch)
    first = {n: g.clone() for n, g in gradients(model).items()}
    algorithms.create("fomaml", model, inner_lr=LR, inner_steps=2).meta_backward(batch)
    assert relative_error(first, gradients(model)) < 1e-10


def test_learned_rates_through_adam_agree_between_engines() -> None:
    for name in ("meta_sgd", "maml_pp"):
        found = []
        for engine in ENGINES:
            settings = {"inner_lr": 0.01, "inner_steps": 3, "inner_optimizer": "adam"}
            algorithm = algorithms.create(name, make_model(), engine=engine, **settings)
            away_from_their_start(algorithm.beside)
            algorithm.meta_backward(derivation.make_batch())
            found.append({str(i): p.grad for i, p in enumerate(algorithm.parameters())})
        assert relative_error(*found) < 1e-10


def test_steps_beyond_the_learned_ones_take_the_last_ones_rate() -> None:
    batch = derivation.make_batch()
    algorithm = algorithms.create("maml_pp", make_model(), inner_lr=LR, inner_steps=1)
    expected = algorithms.create("maml", make_model(), inner_lr=LR).evaluate(batch, 4)
    assert torch.allclose(algorithm.evaluate(batch, 4).loss, expected.loss, rtol=1e-10)


@pytest.mark.parametrize(
    ("norm", "fixed"),
    [("transductive", ()), ("single", ()), ("support", ("norm1.bias", "norm2.bias"))],
)
def test_imamls_gradient_comes_to_that_of_a_dense_solve(norm: str, fixed: tuple) -> None:
    # A smaller lambda leaves I + H / lambda indefinite here: batch norm curves the loss both ways.
    model, batch = make_model(), derivation.make_batch(tasks=2)
    model.outer_only = frozenset(fixed)
    expected = derivation.implicit_gradient(
        model, batch, steps=2, lr=0.005, strength=100.0, norm=norm, fixed=fixed
    )
    settings = {"inner_lr": 0.005, "inner_steps": 2, "proximal": 100.0, "norm": norm}
    for engine in ENGINES:
        errors = []
        for cg_steps in (1, 3, 50):
            imaml = algorithms.create("imaml", model, cg_steps=cg_steps, engine=engine, **settings)
            imaml.meta_backward(batch)
            errors.append(relative_error(gradients(model), expected))
        assert errors[0] > 3 * errors[1] > 0
        assert errors[2] < 1e-10


def test_conjugate_gradient_solves_each_task_and_stops_where_it_cannot() -> None:
    torch.manual_seed(0)
    root = torch.randn(2, 5, 5, dtype=torch.float64)
    matrices = torch.cat([root @ root.mT + torch.eye(5), -torch.eye(5).expand(1, 5, 5)])
    target = torch.randn(3, 5, dtype=torch.float64)
    target[1] = 0

    def product(vector: list) -> list:
        whole = torch.cat([part.flatten(1) for part in vector], 1)
        moved = (matrices @ whole.unsqueeze(2)).squeeze(2)
        return [moved[:, :2], moved[:, 2:].view(3, 3, 1)]

    parts = [target[:, :2], target[:, 2:].view(3, 3, 1)]
    solved = torch.cat([part.flatten(1) for part in conjugate_gradient(product, parts, 9)], 1)
    assert torch.allclose(solved[0], torch.linalg.solve(matrices[0], target[0]), rtol=1e-10)
    assert torch.equal(solved[1], target[1])
    assert torch.equal(solved[2], target[2])  # not convex: b itself


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("norm", MODES)
def test_cavias_gradient_equals_the_derivation(norm: str, steps: int, engine: str) -> None:
    model, batch = make_model(), derivation.make_batch()
    settings = {"inner_lr": LR, "inner_steps": steps, "norm": norm, "engine": engine}
    cavia = algorithms.create("cavia", model, contexts=7, **settings)
    away_from_their_start(cavia.beside)
    film = {n: cavia.beside[f"film.{n}"].detach() for n in ("weight", "bias")}
    expected, by_film = derivation.context_gradient(
        model, batch, film, steps=steps, lr=LR, norm=norm
    )
    cavia.meta_backward(batch)
    assert relative_error(gradients(model), expected) < 1e-10
    found = {n: cavia.beside[f"film.{n}"].grad for n in film}
    assert relative_error(found, by_film) < 1e-10
