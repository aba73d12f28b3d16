"""Any module that a user brings: its own gradient, or a line that says why not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import algorithms
from tests.algorithms.test_batched import both, make_batch
from tests.algorithms.test_meta_gradients import relative_error

LR, STEPS = 0.3, 2


def derived(model: nn.Module, batch) -> dict[str, Tensor]:
    """MAML's meta-gradient by torch alone: the user's model, at fast weights, task by task."""
    theta = dict(model.named_parameters())
    total = []
    for xs, ys, xq, yq in zip(*batch["train"], *batch["test"], strict=True):
        fast: dict[str, Tensor] = dict(theta)
        for _ in range(STEPS):
            loss = F.cross_entropy(functional_call(model, fast, (xs,)), ys)
            found = torch.autograd.grad(
                loss, list(fast.values()), create_graph=True, allow_unused=True
            )
            fast = {
                name: value if g is None else value - LR * g
                for (name, value), g in zip(fast.items(), found, strict=True)
            }
        total.append(F.cross_entropy(functional_call(model, fast, (xq,)), yq))
    mean = torch.stack(total).mean()
    found = torch.autograd.grad(mean, list(theta.values()), allow_unused=True)
    zeros = (torch.zeros_like(value) for value in theta.values())
    return {n: z if g is None else g for n, g, z in zip(theta, found, zeros, strict=True)}


class Cosine(nn.Module):
    """Reads its head's weight without calling the head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        features = F.normalize(self.body(x).tanh(), dim=-1)
        return 5 * F.linear(features, F.normalize(self.head.weight, dim=-1))


class ReadFirst(nn.Module):
    """Reads a layer's weight before it calls the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x @ self.a.weight + self.a(x)).tanh())


class Lists(nn.Module):
    """Keeps its weights in lists of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.many = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in range(2)])
        self.named = nn.ParameterDict({"head": nn.Parameter(torch.randn(4, 3))})

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.many:
            x = (x @ weight).tanh()
        return x @ self.named["head"]


class Attentive(nn.Module):
    """Torch's own attention, whose fast kernels cannot be differentiated twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x.view(-1, 2, 2))).mean(1))


class ScaledDot(nn.Module):
    """The same kernels, called by name, between layers that batch."""

    def __init__(self) -> None:
        super().__init__()
        self.made, self.head = nn.Linear(2, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.made(x.view(-1, 1, 2, 2)).chunk(3, dim=-1)
        return self.head(F.scaled_dot_product_attention(q, k, v).mean((1, 2)))


class TimeFirst(nn.Module):
    """Puts the parts of a sample before the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x.view(-1, 2, 2).transpose(0, 1)).tanh().mean(0))


class TwoViews(nn.Module):
    """Doubles the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.a(torch.cat([x, x.flip(-1)])).tanh().chunk(2)
        return self.head(one * other)


class Positions(nn.Module):
    """Looks positions up, which are the same for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.at, self.head = nn.Linear(2, 4), nn.Embedding(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.a(x.view(-1, 2, 2)) + self.at(torch.arange(2))
        return self.head(parts.tanh().mean(1))


class LooksAtTypes(nn.Module):
    """Rectifies after each linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.Linear):
                x = x.tanh()
        return x


class Folded(nn.Module):
    """Normalises the parts of all samples as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x.reshape(-1, 2)).reshape(-1, 4))


class Tempered(nn.Module):
    """A learned temperature, which has no dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.temperature = nn.Linear(4, 3), nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.temperature * self.head(x)


PLAIN = [ScaledDot, Folded]
ONE_BY_ONE = [
    Cosine,
    ReadFirst,
    Lists,
    Tempered,
    Attentive,
    TimeFirst,
    TwoViews,
    Positions,
    LooksAtTypes,
]


@pytest.mark.parametrize("kind", [*PLAIN, *ONE_BY_ONE])
def test_the_meta_gradient_is_that_of_the_users_model(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, batch = kind().double(), make_batch((4,), tasks=3)
    with sdpa_kernel(SDPBackend.MATH):
        expected = derived(model, batch)
    for engine in ("auto", "higher"):
        maml = algorithms.create("maml", model, inner_lr=LR, inner_steps=STEPS, engine=engine)
        maml.meta_backward(batch)
        found = {name: value.grad for name, value in model.named_parameters()}
        assert relative_error(found, expected) < 1e-10
        assert maml.engine == ("batched" if engine == "auto" and kind in PLAIN else "higher")


@pytest.mark.parametrize("tasks", [2, 3, 4])
@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_what_cannot_be_batched_is_refused(kind: type[nn.Module], tasks: int) -> None:
    with pytest.raises(algorithms.AlgorithmError, match="engine 'higher' may run it"):
        algorithms.create("maml", kind().double(), engine="batched").meta_backward(
            make_batch((4,), tasks=tasks)
        )


class LooksForNorm(nn.Module):
    """Takes another branch where its batch norm has been replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            x = x.tanh() if isinstance(layer, nn.BatchNorm1d) else x
        return x


@pytest.mark.parametrize("engine", ["auto", "higher"])
def test_a_model_that_no_engine_computes_is_refused(engine: str) -> None:
    maml = algorithms.create("maml", LooksForNorm().double(), engine=engine)
    for use in (maml.meta_backward, maml.evaluate):
        with pytest.raises(algorithms.AlgorithmError, match="look at the types of its modules"):
            use(make_batch((4,)))


def test_statistics_of_the_support_set_are_those_of_all_parts_of_its_samples() -> None:
    model, batch = Folded().double(), make_batch((4,))
    support, query = batch["train"][0], batch["test"][0]
    rows = support.reshape(len(support), -1, 2)
    mean, var = rows.mean(1), rows.var(1, correction=0)
    scaled = (query.unflatten(-1, (2, 2)) - mean[:, None, None]) / (var + 1e-5).sqrt()[
        :, None, None
    ]
    outputs = model.head(scaled.flatten(-2))
    losses = torch.stack(
        [F.cross_entropy(o, y) for o, y in zip(outputs, batch["test"][1], strict=True)]
    )
    for engine in both("maml", model, norm="support"):
        torch.testing.assert_close(engine.evaluate(batch, 0).loss[:, 0], losses.detach())


def test_indices_stay_indices() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(8, 3)).double()

    def half(n: int) -> tuple[Tensor, Tensor]:
        return torch.randint(7, (3, n, 2)), torch.randint(3, (3, n))

    batch = {"train": half(6), "test": half(4)}
    expected = derived(model, batch)
    for maml in both("maml", model, inner_lr=LR, inner_steps=STEPS):
        maml.meta_backward(batch)
        found = {name: value.grad for name, value in maml.model.named_parameters()}
        assert relative_error(found, expected) < 1e-10


def test_a_frozen_parameter_of_the_head_stays() -> None:
    model, batch = (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(),
        make_batch((4,)),
    )
    model[2].bias.requires_grad_(False)
    for name, settings in {"anil": {}, "finetune": {"train_classes": 7}}.items():
        batched, higher = both(name, model, **settings)
        assert batched.adapted() == higher.adapted() == ["2.weight"]
        torch.testing.assert_close(
            batched.evaluate(batch, 4).loss, higher.evaluate(batch, 4).loss, rtol=1e-10, atol=0
        )
    model.outer_only = ("2.weight", "0.bias")
    assert algorithms.create("maml", model).adapted() == ["0.weight"]
    for wrong in ("2.weight", ("2.wieght",)):
        model.outer_only = wrong
        with pytest.raises(algorithms.AlgorithmError, match=r"must be names of .* as '0\.bias'"):
            algorithms.create("maml", model)


@pytest.mark.parametrize(
    "name",
    [n for n in algorithms.names() if n not in ("cavia", "protonet", "finetune_pp", "nearest")],
)
def test_a_parameter_without_dimensions_is_one_like_any_other(name: str) -> None:
    batch = make_batch((4,))
    batch |= {"classes": (batch["train"][1], batch["test"][1])}
    own = {"train_classes": 7} if name == "finetune" else {}
    model = Tempered().double()
    algorithm = algorithms.create(name, model, **own)
    algorithm.meta_backward(batch)
    assert algorithm.evaluate(batch, 2).loss.isfinite().all()
    if algorithm.parameters():
        assert model.temperature.grad.isfinite()


def test_a_model_that_cannot_be_copied_is_refused_in_a_line() -> None:
    model = Tempered().double()
    model.last = model(torch.zeros(1, 4).double())
    with pytest.raises(algorithms.AlgorithmError, match="the model cannot be copied: Only Tensors"):
        algorithms.create("maml", model)


def test_a_tasks_mini_batches_are_its_own_whoever_draws_them() -> None:
    model, batch = nn.Linear(4, 3).double(), make_batch((4,), tasks=4)
    reptile = algorithms.create("reptile", model, inner_batch=2, inner_steps=3)

    def gradient(first: int, last: int) -> Tensor:
        reptile.task_seeds = list(range(10 + first, 10 + last))
        part = {n: tuple(half[first:last] for half in halves) for n, halves in batch.items()}
        reptile.meta_backward(part)
        return model.weight.grad.clone()

    whole, parts = gradient(0, 4), (3 * gradient(0, 3) + gradient(3, 4)) / 4
    torch.testing.assert_close(parts, whole)
    reptile.task_seeds = [0, 1, 2, 3]
    reptile.meta_backward(batch)
    assert not torch.allclose(model.weight.grad, whole)
