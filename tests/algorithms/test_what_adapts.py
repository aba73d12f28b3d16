"""What each algorithm learns and adapts: all, parts, an input of the network, or nothing."""

import pytest
import torch
from torch import nn

import algorithms
from algorithms import models
from algorithms.cavia import modulated_layer
from tests.algorithms import derivation
from tests.algorithms.test_meta_gradients import make_batch_with_classes


def make(name: str, **settings) -> algorithms.Algorithm:
    torch.manual_seed(0)
    return algorithms.create(name, derivation.Net().double(), **settings)


@pytest.mark.parametrize("name", ["nearest", "protonet"])
def test_what_does_not_adapt_scores_the_same_after_every_step(name: str) -> None:
    scores = make(name).evaluate(derivation.make_batch(), 3)
    assert scores.loss.shape == scores.metric.shape == (3, 4)
    assert torch.equal(scores.loss, scores.loss[:, :1].expand(3, 4))
    assert make(name).evaluate(derivation.make_batch()).loss.shape == (3, 1)


def test_nearest_gives_the_class_of_the_nearest_mean() -> None:
    batch = derivation.make_batch(tasks=4, shots=3, queries=4)
    right = []
    for i in range(4):
        (xs, ys), (xq, yq) = ((x[i].flatten(1), y[i]) for x, y in batch.values())
        means = torch.stack([xs[ys == k].mean(0) for k in range(3)])
        right.append((torch.cdist(xq, means).argmin(1) == yq).double().mean())
    for engine in ("higher", "batched"):
        nearest = make("nearest", engine=engine)
        assert torch.equal(nearest.evaluate(batch, 0).metric[:, 0], torch.stack(right))
        assert torch.equal(nearest.meta_backward(batch).metric, torch.stack(right))
        assert nearest.parameters() == []


def test_protonet_learns_all_but_the_head() -> None:
    protonet, batch = make("protonet"), derivation.make_batch(tasks=4)
    assert not any(name.startswith("head") for name in protonet.meta_parameters)
    optimizer = torch.optim.Adam(protonet.parameters(), lr=0.01)
    before = {n: v.clone() for n, v in protonet.model.state_dict().items()}
    losses = []
    for _ in range(20):
        losses.append(float(protonet.meta_backward(batch).loss.mean()))
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    after = protonet.model.state_dict()
    assert torch.equal(after["head.weight"], before["head.weight"])
    assert not torch.equal(after["conv1.weight"], before["conv1.weight"])


@pytest.mark.parametrize("name", ["finetune", "finetune_pp"])
def test_pre_training_learns_the_training_classes_and_never_the_head(name: str) -> None:
    batch = make_batch_with_classes(classes=7)
    baseline = make(name, train_classes=7)
    assert baseline.adapted()[0] == "head.weight"
    assert not any(name.startswith("head") for name in baseline.meta_parameters)
    head = baseline.model.head.weight.clone()
    optimizer = torch.optim.Adam(baseline.parameters(), lr=0.02)
    for _ in range(20):
        scores = baseline.meta_backward(batch)
        optimizer.step()
    assert scores.metric.mean() > 0.9  # among all seven, where chance is a seventh
    assert torch.equal(baseline.model.head.weight, head)
    before = [p.clone() for p in baseline.parameters()]
    later = baseline.evaluate(batch, 5)
    assert later.loss[:, 5].mean() < later.loss[:, 0].mean()
    assert all(torch.equal(p, b) for p, b in zip(baseline.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["finetune", "finetune_pp"])
def test_what_pre_training_cannot_do_is_said_in_a_line(name: str) -> None:
    with pytest.raises(algorithms.AlgorithmError, match=f"{name} needs train_classes"):
        make(name)
    with pytest.raises(algorithms.AlgorithmError, match="train_classes is 0"):
        make(name, train_classes=0)
    with pytest.raises(algorithms.AlgorithmError, match='batch has no "classes"'):
        make(name, train_classes=7).meta_backward(derivation.make_batch())
    with pytest.raises(algorithms.AlgorithmError, match="linear head"):
        algorithms.create(name, nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), train_classes=7)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_scratch_keeps_its_random_weights_and_adapts_as_maml_does(optimizer) -> None:
    batch = derivation.make_batch()
    scratch, maml = (make(name, inner_lr=0.1, inner_steps=3) for name in ("scratch", "maml"))
    before = [p.detach().clone() for p in scratch.parameters()]
    outer = optimizer(scratch.parameters(), lr=1.0)
    scores = scratch.meta_backward(batch)
    outer.step()
    assert all(torch.equal(p, b) for p, b in zip(scratch.parameters(), before, strict=True))
    assert torch.equal(scores.loss, maml.evaluate(batch).loss[:, -1])


@pytest.mark.parametrize("name", ["boil", "protonet", "finetune", "finetune_pp"])
def test_a_model_that_is_all_head_is_refused(name: str) -> None:
    own = {"train_classes": 7} if name.startswith("finetune") else {}
    with pytest.raises(algorithms.AlgorithmError, match="before the head"):
        algorithms.create(name, nn.Linear(3, 2), **own)


@pytest.mark.parametrize("name", ["nearest", "protonet"])
def test_regression_has_no_class_means(name: str) -> None:
    x = torch.randn(2, 5, 1)
    model = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
    with pytest.raises(algorithms.AlgorithmError, match="classes"):
        algorithms.create(name, model).evaluate({"train": (x, x), "test": (x, x)}, 0)


def test_hyperparameters_are_those_that_mean_something() -> None:
    known = {name: algorithms.hyperparameters(algorithms.get(name)) for name in algorithms.names()}
    assert set(known["nearest"]) == {"engine"}
    assert set(known["protonet"]) == {"norm", "engine"}
    assert known["maml"] == known["boil"]
    with pytest.raises(algorithms.AlgorithmError, match="protonet has no 'inner_lr'"):
        make("protonet", inner_lr=0.1)


def test_cavia_starts_as_the_network_that_it_modulates() -> None:
    cavia, batch = make("cavia", contexts=4), derivation.make_batch()
    plain = make("maml")
    plain.model.load_state_dict({n: v for n, v in cavia.state_dict().items() if "/" not in n})
    assert cavia.film.generator.weight.any()
    torch.testing.assert_close(cavia.evaluate(batch, 0).loss, plain.evaluate(batch, 0).loss)


def test_maml_pp_takes_the_last_rate_for_steps_beyond_those_it_learned() -> None:
    algorithm, batch = make("maml_pp", inner_steps=2, inner_lr=0.1), derivation.make_batch()
    with torch.no_grad():
        for name in algorithm.adapted():
            algorithm.beside[f"rates.{name}"].copy_(torch.tensor([0.3, 0.05]))
    name = algorithm.adapted()[0]
    assert [algorithm.rate(name, step).item() for step in (0, 1, 2, 9)] == pytest.approx(
        [0.3, 0.05, 0.05, 0.05]
    )
    assert algorithm.evaluate(batch, 4).loss.isfinite().all()


@pytest.mark.parametrize("name", ["finetune", "finetune_pp"])
def test_a_classifier_of_the_baselines_starts_without_biases(name: str) -> None:
    algorithm = make(name, train_classes=7)
    if name == "finetune":
        biases = [v for n, v in algorithm.beside.items() if n.endswith("bias")]
        assert biases
        assert not any(bias.any() for bias in biases)
    assert any(value.any() for value in algorithm.beside.values())


def test_cavia_adapts_its_context_alone_and_never_learns_it() -> None:
    cavia, batch = make("cavia", contexts=4, inner_lr=1.0), derivation.make_batch()
    (context,) = cavia.adapted()
    assert cavia.network.get_parameter(context) is cavia.film.context.weight
    optimizer = torch.optim.SGD(cavia.parameters(), lr=0.1)
    before = cavia.evaluate(batch, 2).loss
    for _ in range(3):
        cavia.meta_backward(batch)
        optimizer.step()
    assert not cavia.film.context.weight.any()
    after = cavia.evaluate(batch, 2).loss
    assert after[:, 2].mean() < before[:, 2].mean()
    assert not torch.equal(after[:, 0], after[:, 2])


@pytest.mark.parametrize(("network", "place"), [("conv4", "body.7"), ("mlp", "body.1")])
def test_a_context_modulates_the_papers_layer(network: str, place: str) -> None:
    model = models.build(network, (1, 20, 20), 3, seed=0)
    assert modulated_layer(model) is model.get_submodule(place)


def test_a_model_without_a_layer_to_modulate_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(algorithms.AlgorithmError, match="two layers of weights before the head"):
        algorithms.create("cavia", model)


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("cavia", {"contexts": 0}, "contexts is 0"),
        ("imaml", {"proximal": 0}, "proximal is 0; it must be positive"),
        ("imaml", {"cg_steps": 0}, "cg_steps is 0; it must be positive"),
        ("finetune_pp", {"scale": 0}, "scale is 0; it must be positive"),
        ("maml_pp", {"multi_step_until": 1.5}, "multi_step_until is 1.5; it must be from 0 to 1"),
    ],
)
def test_a_bad_setting_of_an_algorithms_own_is_named(
    name: str, setting: dict, message: str
) -> None:
    with pytest.raises(algorithms.AlgorithmError, match=message):
        make(name, **setting)


@pytest.mark.parametrize("name", ["meta_sgd", "metacurvature", "maml_pp", "cavia"])
def test_state_brings_back_all_that_was_learned(name: str) -> None:
    batch, (learned, other) = derivation.make_batch(), (make(name), make(name))
    optimizer = torch.optim.SGD(learned.parameters(), lr=0.1)
    learned.meta_backward(batch)
    optimizer.step()
    assert not torch.equal(learned.evaluate(batch).loss, other.evaluate(batch).loss)
    other.load_state_dict({n: v.clone() for n, v in learned.state_dict().items()})
    assert torch.equal(learned.evaluate(batch).loss, other.evaluate(batch).loss)
