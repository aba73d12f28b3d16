"""The batched engine does what the reference does, for any model that it says it supports."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.parametrizations import weight_norm

import algorithms
from algorithms import kernels, models, task_convolutions, task_normalisation
from algorithms.kernels import Windows
from algorithms.normalisation import MODES
from algorithms.task_convolutions import Convolution, FromPatches, Patches, Window, convolution
from algorithms.task_normalisation import normalise
from algorithms.verification import verify
from tests.algorithms import derivation
from tests.algorithms.test_meta_gradients import make_model, relative_error

ALGORITHMS = ("maml", "fomaml", "reptile", "anil", "pretrained")
SHAPES = {"conv4": (1, 20, 20), "conv4_mean": (1, 20, 20), "conv4_pool": (2, 16, 17), "fc": (7,)}
SHAPES["conv4_leaky"] = (1, 16, 17)


def make_batch(shape: tuple[int, ...], tasks: int = 3, support: int = 6, query: int = 4, out=None):
    g = torch.Generator().manual_seed(0)

    def half(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(tasks, n, *shape, generator=g, dtype=torch.float64)
        y = torch.randint(3, (tasks, n), generator=g)
        return x, y if out is None else torch.randn(tasks, n, out, generator=g, dtype=x.dtype)

    return {"train": half(support), "test": half(query)}


def both(name: str, model: nn.Module, **settings):
    """The algorithm on each engine, over models of their own."""
    return [
        algorithms.create(name, copy.deepcopy(model), engine=engine, **settings)
        for engine in ("batched", "higher")
    ]


def assert_same_gradients(batched, higher, tolerance: float = 1e-10) -> None:
    found, expected = ({n: p.grad for n, p in a.meta_parameters.items()} for a in (batched, higher))
    assert relative_error(found, expected) < tolerance


def assert_same_scores(found, expected) -> None:
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.metric, expected.metric, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", MODES)
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_meta_gradient_equals_the_derivation(name: str, steps: int, norm: str) -> None:
    model, batch = make_model(), derivation.make_batch()
    expected = derivation.meta_gradient(name, model, batch, steps=steps, lr=0.3, norm=norm)
    algorithm = algorithms.create(
        name, model, inner_lr=0.3, inner_steps=steps, norm=norm, engine="batched"
    )
    algorithm.meta_backward(batch)
    assert relative_error({n: p.grad for n, p in model.named_parameters()}, expected) < 1e-10


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("norm", MODES)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_both_engines_train_and_evaluate_alike(
    name: str, norm: str, steps: int, optimizer: str
) -> None:
    batched, higher = both(
        name,
        make_model(),
        inner_lr=0.1 if optimizer == "sgd" else 0.01,
        inner_steps=steps,
        inner_optimizer=optimizer,
        norm=norm,
    )
    for seed in range(2):
        batch = derivation.make_batch(seed=seed)
        assert_same_scores(batched.meta_backward(batch), higher.meta_backward(batch))
        assert_same_gradients(batched, higher)
        assert_same_scores(batched.evaluate(batch), higher.evaluate(batch))
    for found, expected in zip(batched.model.buffers(), higher.model.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert (batched.engine, higher.engine) == ("batched", "higher")


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("network", SHAPES)
def test_the_papers_networks_agree(network: str, name: str, steps: int) -> None:
    model = models.build(network, SHAPES[network], 3, seed=0)
    settings = {"inner_lr": 0.1, "inner_steps": steps}
    assert verify(name, model, make_batch(SHAPES[network]), settings) < 1e-10


@pytest.mark.parametrize("name", ["boil", "cavia", "imaml", "maml_pp", "meta_sgd", "protonet"])
@pytest.mark.parametrize("network", ["conv4", "conv4_pool"])
def test_the_papers_networks_agree_under_newer_algorithms(network: str, name: str) -> None:
    model = models.build(network, SHAPES[network], 3, seed=0)
    assert verify(name, model, make_batch(SHAPES[network]), {}) < 1e-10


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_regression_agrees(name: str, optimizer: str) -> None:
    model = models.build("mlp", (1,), 2, seed=0)
    settings = {"inner_lr": 0.01, "inner_steps": 3, "inner_optimizer": optimizer}
    assert verify(name, model, make_batch((1,), out=2), settings) < 1e-10


@pytest.mark.parametrize("name", ALGORITHMS)
def test_minibatches_and_clipping_agree(name: str) -> None:
    batch = derivation.make_batch(shots=4)
    settings = {"inner_lr": 0.3, "inner_steps": 5, "inner_batch": 5, "inner_clip": 0.02}
    batched, higher = both(name, make_model(), eval_batch=4, **settings)
    scores = []
    for algorithm in (batched, higher):
        torch.manual_seed(5)
        scores.append(algorithm.meta_backward(batch))
    assert_same_scores(*scores)
    assert_same_gradients(batched, higher)
    assert_same_scores(batched.evaluate(batch, 7), higher.evaluate(batch, 7))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("norm", MODES)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_step_that_is_computed_again_is_the_same_step(
    name: str, norm: str, optimizer: str
) -> None:
    settings = {"inner_lr": 0.05, "inner_steps": 4, "inner_optimizer": optimizer, "norm": norm}
    model, batch = make_model(), derivation.make_batch()
    kept, again = (
        algorithms.create(name, copy.deepcopy(model), checkpoint_inner=each, **settings)
        for each in (False, True)
    )
    assert_same_scores(again.meta_backward(batch), kept.meta_backward(batch))
    assert_same_gradients(again, kept, 1e-14)
    for found, expected in zip(again.model.buffers(), kept.model.buffers(), strict=True):
        assert torch.equal(found, expected)


def test_dropout_is_drawn_once_for_a_step_that_is_computed_again() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(7, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    gradients = []
    for again in (False, True):
        maml = algorithms.create(
            "maml", copy.deepcopy(model), inner_steps=3, checkpoint_inner=again
        )
        torch.manual_seed(3)
        maml.meta_backward(make_batch((7,)))
        gradients.append(torch.cat([p.grad.flatten() for p in maml.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-15)


def test_steps_cannot_be_computed_again_by_higher() -> None:
    with pytest.raises(algorithms.AlgorithmError, match="checkpoint_inner needs the batched"):
        algorithms.create("maml", make_model(), engine="higher", checkpoint_inner=True)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_gradient_is_the_same_however_many_tasks_a_pass_takes(name: str) -> None:
    batch = make_batch((7,), tasks=5)
    model = models.build("fc", (7,), 3, seed=0).double()
    gradients = []
    for most in (None, 1, 2):
        algorithm = algorithms.create(name, copy.deepcopy(model), tasks_per_pass=most)
        algorithm.meta_backward(batch)
        gradients.append(torch.cat([p.grad.flatten() for p in algorithm.parameters()]))
        assert algorithm.inner_loop.tasks_per_pass == most or most is None
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-12, atol=1e-15)


class Noting(nn.Module):
    """A linear layer that notes on how many threads it is computed."""

    threads: ClassVar[set[int]] = set()

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.isinf().any():
            raise FloatingPointError("on the way")
        self.threads.add(torch.get_num_threads())
        return self.head(x)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("tasks", "threads"), [(3, 1), (2**10, 2)])
def test_work_too_small_to_share_is_computed_on_one_thread(tasks: int, threads: int) -> None:
    maml = algorithms.create("maml", Noting(7).double(), engine="batched")
    batch = make_batch((7,), tasks)
    maml.meta_backward(batch)  # sizes are known from here on
    for compute in (maml.meta_backward, maml.evaluate):
        Noting.threads.clear()
        compute(batch)
        assert Noting.threads == {threads}
        assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_the_threads_come_back_when_a_model_fails() -> None:
    maml = algorithms.create("maml", Noting(7).double(), engine="batched")
    batch = make_batch((7,))
    maml.meta_backward(batch)
    batch["test"][0].fill_(float("inf"))
    with pytest.raises(FloatingPointError):
        maml.meta_backward(batch)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_threads_of_the_users_own_leave_the_number_of_threads() -> None:
    batch = make_batch((7,))
    mamls = [algorithms.create("maml", Noting(7).double()) for _ in range(8)]
    with ThreadPoolExecutor(len(mamls)) as pool:
        for _ in range(3):
            list(pool.map(lambda maml: maml.evaluate(batch), mamls))
    with ThreadPoolExecutor(1) as fresh:
        assert fresh.submit(torch.get_num_threads).result() == torch.get_num_threads() == 2


class Zoo(nn.Module):
    """One of every other layer that is supported, in a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.mix = nn.Conv1d(6, 4, 3, padding="same", dilation=2)
        self.instance = nn.InstanceNorm1d(4, affine=True)
        self.batch1d = nn.BatchNorm1d(4)
        self.wide = nn.Conv2d(2, 6, (3, 2), stride=(1, 2), padding=(0, 1))
        self.group = nn.GroupNorm(3, 6)
        self.one = nn.Conv2d(6, 4, 1, stride=2, bias=False)
        self.layer = nn.LayerNorm([4, 5])
        self.plain = nn.InstanceNorm2d(4)
        self.last = nn.LayerNorm(4, elementwise_affine=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:  # (n, 10) of integers 0 .. 9
        x = self.embed(x.long()).transpose(1, 2)
        x = torch.tanh(self.batch1d(self.instance(self.mix(x))))
        x = x.reshape(len(x), 2, 2, 10).repeat(1, 1, 3, 1)
        x = F.softplus(self.group(self.wide(x)))
        x = F.avg_pool2d(self.plain(self.one(x)), 1, 1).sum(2)[..., [0, 1, 2, 0, 1]]
        x = self.layer(x.view(len(x), 4, 5)).mean(2)
        return self.head(self.last(x))


@pytest.mark.parametrize("norm", MODES)
@pytest.mark.parametrize("name", ["maml", "anil"])
def test_other_layers_agree(name: str, norm: str) -> None:
    torch.manual_seed(0)
    batch = make_batch((10,))
    batch = {h: ((x * 3).round().clamp(0, 9), y) for h, (x, y) in batch.items()}
    settings = {"inner_lr": 0.1, "inner_steps": 2, "norm": norm}
    assert verify(name, Zoo(), batch, settings) < 1e-10


def test_frozen_and_tied_parameters_agree() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    model[2] = model[0]
    model[4].bias.requires_grad_(False)
    settings = {"inner_lr": 0.1, "inner_steps": 2}
    for name in ALGORITHMS:
        assert verify(name, model, make_batch((4,)), settings) < 1e-10


def test_auto_is_batched_where_it_can_be() -> None:
    algorithm = algorithms.create("maml", models.build("conv4", (1, 8, 8), 3, seed=0))
    assert (algorithm.engine, algorithm.engine_reason) == ("batched", "")


def unsupported_models() -> dict[str, tuple[nn.Module, str]]:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) * self.scale

    grouped = nn.Sequential(nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 4, 1, groups=2), nn.Flatten())
    return {
        "PReLU": (nn.Sequential(nn.Linear(4, 3), nn.PReLU()), "PReLU (1)"),
        "own parameter": (Scaled(), "Scaled"),
        "parametrized": (nn.Sequential(weight_norm(nn.Linear(4, 3))), "ParametrizedLinear"),
        "groups": (grouped, "groups=2"),
        "padding_idx": (nn.Sequential(nn.Embedding(3, 4, padding_idx=0)), "padding_idx=0"),
    }


@pytest.mark.parametrize("case", unsupported_models())
def test_an_unsupported_layer_is_named(case: str) -> None:
    model, named = unsupported_models()[case]
    with pytest.raises(algorithms.AlgorithmError) as caught:
        algorithms.create("maml", model, engine="batched")
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    algorithm = algorithms.create("maml", model)
    assert algorithm.engine == "higher"
    assert named in algorithm.engine_reason


def test_a_layer_whose_hooks_no_engine_would_run_is_refused() -> None:
    for hook in ("register_forward_hook", "register_forward_pre_hook"):
        for layer in (nn.Linear(4, 4), nn.BatchNorm1d(4)):
            model = nn.Sequential(layer, nn.Linear(4, 3))
            getattr(layer, hook)(lambda *_: None)
            for engine in ("auto", "higher", "batched"):
                with pytest.raises(algorithms.AlgorithmError, match="hooks"):
                    algorithms.create("maml", model, engine=engine)


def test_a_hook_after_batch_norm_is_run() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).double()
    batch = make_batch((4,))
    algorithm = algorithms.create("maml", model, inner_lr=0.1)
    before = algorithm.evaluate(batch)
    model[2].register_forward_hook(lambda _, __, out: 0 * out)
    after = algorithms.create("maml", model, inner_lr=0.1).evaluate(batch)
    assert not torch.allclose(before.loss, after.loss)
    with pytest.raises(algorithms.AlgorithmError, match="ReLU \\(2\\) has hooks"):
        algorithms.create("maml", model, engine="higher")


class Rectified(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


@pytest.mark.parametrize("engine", ["higher", "batched"])
def test_batch_norm_with_a_forward_of_its_own_is_refused(engine: str) -> None:
    with pytest.raises(algorithms.AlgorithmError, match="Rectified is batch normalisation with a"):
        algorithms.create("maml", nn.Sequential(Rectified(4), nn.Linear(4, 3)), engine=engine)


class Listed(nn.Module):
    """Reaches its layers past its modules."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.how = how
        self.body = [self.a, self.b]
        self.close = lambda x: self.b(self.a(x))
        self.unregistered = [nn.Linear(4, 4).double()] if how == "unregistered" else [nn.Identity()]

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "closure":
            return self.head(self.close(x))
        for layer in self.body if self.how == "list" else (self.a, self.b):
            x = layer(x).tanh()
        return self.head(self.unregistered[0](x))


@pytest.mark.parametrize("engine", ["auto", "higher", "batched"])
def test_layers_that_could_not_adapt_are_named(engine: str) -> None:
    batch = make_batch((4,))
    reached = {"list": r"a\.weight", "closure": r"a\.weight", "unregistered": r"a parameter \(4"}
    for how, name in reached.items():
        algorithm = algorithms.create("fomaml", Listed(how).double(), engine=engine)
        for compute in (algorithm.meta_backward, algorithm.evaluate):
            with pytest.raises(algorithms.AlgorithmError, match=f"reaches {name}.* past"):
                compute(batch)
    algorithms.create("fomaml", Listed("attributes").double(), engine=engine).meta_backward(batch)


class Centred(nn.Module):
    """Mixes the samples of its batch, which no layer tells."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x - x.mean(0))


class CentredInTraining(Centred):
    """Mixes them in training alone, and keeps a count."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.head(x - x.mean(0) if self.training else x)


class Fussy(nn.Module):
    """Insists on six samples, or four."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.view(6 if len(x) == 6 else 4, 4))


@pytest.mark.parametrize(
    ("model", "reason"),
    [(Centred(), "mixes"), (CentredInTraining(), "mixes"), (Fussy(), "does not run")],
)
def test_code_that_cannot_be_batched_is_found_out(model: nn.Module, reason: str) -> None:
    batch = make_batch((4,))
    model = model.double()
    batched = algorithms.create("maml", model, engine="batched")
    for use in (batched.meta_backward, batched.evaluate):
        with pytest.raises(algorithms.AlgorithmError, match=reason):
            use(batch)
    auto, higher = (algorithms.create("maml", model, engine=e) for e in ("auto", "higher"))
    assert_same_scores(auto.meta_backward(batch), higher.meta_backward(batch))
    assert auto.engine == "higher"
    assert reason in auto.engine_reason


class Noisy(nn.Module):
    """Drops out in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(x * self.scale, 0.5))


@pytest.mark.parametrize("engine", ["higher", "batched"])
def test_to_look_at_a_model_draws_nothing(engine: str) -> None:
    model, batch = Noisy().double(), make_batch((4,))
    losses = []
    for looks in (0, 1):
        algorithm = algorithms.create("maml", model, engine=engine)
        for _ in range(looks):
            algorithm.evaluate(batch)
        torch.manual_seed(1)
        losses.append(algorithm.meta_backward(batch).loss)
    assert torch.equal(*losses)


@pytest.mark.parametrize("engine", ["higher", "batched"])
def test_what_is_loaded_into_a_buffer_and_counted_in_one_is_the_models(engine: str) -> None:
    batch = make_batch((4,))
    model = CentredInTraining().double()
    algorithm = algorithms.create("maml", model, engine="higher")
    algorithm.evaluate(batch, steps=0)
    assert model.runs == 3  # the tasks
    noisy = Noisy().double()
    algorithm = algorithms.create("maml", noisy, engine=engine)
    noisy.load_state_dict(noisy.state_dict() | {"scale": torch.zeros(())})
    expected = torch.log_softmax(noisy.head.bias, 0)
    found = algorithm.evaluate(batch, steps=0).loss[:, 0]
    torch.testing.assert_close(found, -expected[batch["test"][1]].mean(1), check_dtype=False)


class Several(nn.Module):
    """Parts of it take two values and give two."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor | None = None):
            return (self.layer(x), x) if y is None else self.layer(x) + y

    def __init__(self) -> None:
        super().__init__()
        self.gives, self.takes = self.Part(), self.Part()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.takes(*self.gives(x)).tanh())


@pytest.mark.parametrize("name", ["anil", "boil", "maml"])
def test_parts_with_several_inputs_and_outputs_agree(name: str) -> None:
    batch = make_batch((4,))
    batched, higher = both(name, Several().double(), inner_lr=0.3, inner_steps=3)
    assert_same_scores(batched.meta_backward(batch), higher.meta_backward(batch))
    assert_same_gradients(batched, higher)
    assert_same_scores(batched.evaluate(batch, 3), higher.evaluate(batch, 3))


class Viewed(derivation.Net):
    """Flattens with ``view``, which needs memory in the order of the dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm1(self.conv1(x)))
        x = torch.tanh(self.norm2(self.conv2(x)))
        return self.head(x.view(x.size(0), -1))


def test_a_view_of_a_convolutions_output_works() -> None:
    torch.manual_seed(0)
    settings = {"inner_lr": 0.1, "inner_steps": 2}
    assert verify("maml", Viewed(), derivation.make_batch(), settings) < 1e-10


def test_features_that_do_not_adapt_are_made_once() -> None:
    class Counted(nn.Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            return F.dropout(self.layer(x), self.noise, self.training)

    model = nn.Sequential(Counted(), nn.Linear(5, 3)).double()
    anil = algorithms.create("anil", model, inner_steps=4, engine="batched")
    batch = make_batch((4,))
    for noise, in_training in ((0.0, 2), (0.5, 5)):  # noise is drawn anew in every step
        Counted.noise = noise
        anil.evaluate(batch)
        Counted.calls = 0
        anil.evaluate(batch)
        assert Counted.calls == 2
        Counted.calls = 0
        anil.meta_backward(batch)
        assert Counted.calls == in_training


@pytest.mark.parametrize("name", ALGORITHMS)
def test_nothing_outlives_a_step(name: str) -> None:
    model, batch = make_model(), derivation.make_batch()
    algorithm = algorithms.create(name, model, inner_steps=2, engine="batched")

    def live() -> int:
        return sum(issubclass(type(each), Tensor) for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        counts = []
        for iteration in range(40):
            algorithm.meta_backward(batch)
            algorithm.evaluate(batch)
            if iteration in (10, 39):
                counts.append(live())
    finally:
        gc.enable()
    assert counts[0] == counts[1]


def windows() -> list[tuple[Window, tuple[int, int]]]:
    return [
        (Window((3, 3), (2, 2), (1, 1), (1, 1), (1, 1)), (7, 6)),
        (Window((3, 2), (1, 3), (2, 1), (2, 0), (1, 1)), (6, 8)),
        (Window((5, 5), (3, 3), (1, 1), (2, 2), (2, 2)), (3, 3)),
        (Window((1, 1), (2, 2), (1, 1), (0, 0), (0, 0)), (5, 5)),
        (Window((3, 3), (1, 1), (1, 1), (1, 1), (1, 1)), (4, 4)),
        (Window((3, 2), (1, 1), (1, 1), (0, 1), (1, 0)), (5, 4)),
        (Window((1, 1), (1, 1), (1, 1), (1, 1), (1, 1)), (2, 3)),
    ]


@pytest.mark.parametrize(("window", "size"), windows())
def test_patches_differentiate_twice(window: Window, size: tuple[int, int]) -> None:
    images = torch.randn(2, *size, 3, dtype=torch.float64, requires_grad=True)
    patches = Patches.apply(images, window).detach().requires_grad_()
    for function, at in (
        (lambda x: Patches.apply(x, window), images),
        (lambda p: FromPatches.apply(p, window, size), patches),
    ):
        assert gradcheck(function, at)
        assert gradgradcheck(function, at, fast_mode=True)


@pytest.fixture(params=["compiled", "torch"])
def kernels_used(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Tests run by the compiled kernels, which must be there, and by torch's operators."""
    if request.param == "compiled":
        assert kernels.missing() == ""
    else:
        for module in (task_convolutions, task_normalisation):
            monkeypatch.setattr(module, "kernels_for", lambda tensor: None)
    return request.param


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("window", "size"), windows())
def test_convolutions_differentiate_twice(
    window: Window, size: tuple[int, int], shared: bool, kernels_used: str
) -> None:
    if kernels_used == "torch" and window.before != window.after:
        pytest.skip("torch has no convolution with such a padding; patches are used instead")
    images = torch.randn(4, 2, *size, dtype=torch.float64, requires_grad=True)
    each = torch.randn(2, 3, 2, *window.kernel, dtype=torch.float64, requires_grad=True)

    def convolve(images: Tensor, each: Tensor) -> Tensor:
        return Convolution.apply(images, each[:1].expand_as(each) if shared else each, window)

    assert gradcheck(convolve, (images, each))
    assert gradgradcheck(convolve, (images, each), fast_mode=True)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("network", ["conv4", "conv4_pool"])
def test_the_papers_networks_agree_without_compiled_kernels(
    network: str, name: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (task_convolutions, task_normalisation):
        monkeypatch.setattr(module, "kernels_for", lambda tensor: None)
    model = models.build(network, SHAPES[network], 3, seed=0)
    settings = {"inner_lr": 0.1, "inner_steps": steps}
    for native_from in (0, task_convolutions.NATIVE_FROM):
        monkeypatch.setattr(task_convolutions, "NATIVE_FROM", native_from)
        assert verify(name, model, make_batch(SHAPES[network]), settings) < 1e-10


@pytest.mark.parametrize(
    ("kernels_used", "windows"),
    [
        *(("compiled", each) for each in (None, Windows(3, 4, 2, 2), Windows(2, 3, 1, 3))),
        ("torch", None),
    ],
    indirect=["kernels_used"],
)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("scale", [False, True])
def test_normalisation_differentiates_twice(
    scale: bool, shift: bool, relu: bool, windows: Windows | None, kernels_used: str
) -> None:
    torch.manual_seed(0)
    count = 5 if windows is None else 2 * windows.height * windows.width
    rows = torch.randn(2, count, 3, dtype=torch.float64, requires_grad=True)
    affine = torch.randn(2, 2, 1, 3, dtype=torch.float64)
    weight, bias = (
        value.requires_grad_() if there else None
        for value, there in zip(affine, (scale, shift), strict=True)
    )
    given = [each for each in (rows, weight, bias) if each is not None]

    def function(*given: Tensor) -> Tensor:
        rows, *others = given
        left = iter(others)
        weight, bias = (next(left) if there else None for there in (scale, shift))
        return normalise(rows, 1e-5, weight, bias, relu=relu, windows=windows)

    assert gradcheck(function, given)
    assert gradgradcheck(function, given)


POOLS = {
    "side by side": nn.MaxPool2d(2),
    "oblong": nn.MaxPool2d((2, 3)),
    "overlapping": nn.MaxPool2d(3, stride=2),
    "apart": nn.MaxPool2d(2, stride=3),
    "padded": nn.MaxPool2d(2, padding=1),
    "dilated": nn.MaxPool2d(2, dilation=2),
    "to the end": nn.MaxPool2d(2, ceil_mode=True),
    "of one": nn.MaxPool2d(1),
}


@pytest.mark.parametrize("rectified", [True, False])
@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_every_pooling_after_normalisation_agrees(pool: nn.MaxPool2d, rectified: bool) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)]
    layers += [nn.ReLU()] * rectified
    model = nn.Sequential(*layers, copy.deepcopy(pool), nn.Flatten(), nn.LazyLinear(3)).double()
    batch = make_batch((1, 9, 8))
    model(batch["train"][0][0])
    norms = MODES if rectified and pool.kernel_size == pool.stride == 2 else ("transductive",)
    for norm in norms:
        engines = both("maml", model, inner_lr=0.1, inner_steps=2, norm=norm)
        for algorithm in engines:
            algorithm.meta_backward(batch)
        assert_same_gradients(*engines)
        assert_same_scores(*(algorithm.evaluate(batch) for algorithm in engines))


def both_ways(
    rows: Tensor, weight: Tensor, bias: Tensor, windows: Windows | None
) -> Iterator[Tensor]:
    """Normalised, rectified and pooled by the compiled kernels, and by torch's operators, which
    differentiate it, too, until the next is asked for."""
    yield normalise(rows, 1e-5, weight, bias, relu=True, windows=windows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task_normalisation, "kernels_for", lambda tensor: None)
        outputs = normalise(rows, 1e-5, weight, bias, relu=True)
        if windows is not None:
            pictures = outputs.view(-1, windows.height, windows.width, rows.shape[-1])
            pooled = F.max_pool2d(pictures.movedim(-1, 1), windows[2:])
            outputs = pooled.movedim(1, -1).reshape(len(rows), -1, rows.shape[-1])
        yield outputs


@pytest.mark.parametrize("windows", [None, Windows(5, 5, 2, 2)])
@pytest.mark.parametrize(("groups", "pictures"), [(1, 600), (3, 200), (20, 10)])
@pytest.mark.parametrize("channels", [32, 64, 70])
def test_a_normalisation_that_is_cut_into_parts_is_the_one_of_the_whole(
    groups: int, pictures: int, channels: int, windows: Windows | None
) -> None:
    torch.manual_seed(0)
    rows = (torch.randn(groups, pictures * 25, channels) + 3).double().requires_grad_()
    weight, bias, sign = torch.randn(3, groups, 1, channels, dtype=torch.float64)
    given = [rows, weight.requires_grad_(), bias.requires_grad_()]
    found = []
    for outputs in both_ways(rows, weight, bias, windows):
        first = torch.autograd.grad((outputs * sign).tanh().sum(), given, create_graph=True)
        second = torch.autograd.grad(sum(x.tanh().sum() for x in first), given)
        found.append([outputs, *first, *second])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_of_equals_the_first_is_taken_as_torch_does() -> None:
    rows = torch.tensor([2.0, 2.0, 1.0, 0.0, 2.0, 0.0, 0.0, 3.0]).double()
    rows = rows.view(1, 8, 1).requires_grad_()
    weight, bias = torch.ones(2, 1, 1, 1, dtype=torch.float64)
    found = []
    for outputs in both_ways(rows, weight, bias, Windows(2, 4, 2, 2)):
        found.append([outputs, *torch.autograd.grad(outputs[0, 0] * 5, rows)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("kernels_used", "windows"),
    [("compiled", None), ("compiled", Windows(2, 2, 2, 2)), ("torch", None)],
    indirect=["kernels_used"],
)
def test_what_is_not_a_number_stays_so_through_the_rectifier(
    windows: Windows | None, kernels_used: str
) -> None:
    rows = torch.randn(1, 4, 2)
    rows[0, 0, 0] = float("nan")
    outputs = normalise(rows, 1e-5, None, None, relu=True, windows=windows)
    assert outputs[..., 0].isnan().all()
    assert outputs[..., 1].isfinite().all()


def test_normalisation_has_no_third_derivative(kernels_used: str) -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    y = normalise(x, 1e-5, None, None, relu=False)
    (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no third derivative|once_differentiable"):
        torch.autograd.grad(second.sum(), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tasks", [1, 3])
def test_bits_do_not_depend_on_the_number_of_threads(tasks: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    window = Window((3, 3), (2, 2), (1, 1), (1, 1), (1, 1))
    images = torch.randn(tasks * 40, 32, 28, 28, generator=g).to(dtype).requires_grad_()
    each = torch.randn(tasks, 32, 32, 3, 3, generator=g).to(dtype).requires_grad_()
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            features = task_convolutions.convolution(images, each, window)
            rows = features.movedim(1, -1).reshape(tasks, -1, 32)
            outputs = normalise(rows, 1e-5, None, None, relu=True, windows=Windows(14, 14, 2, 2))
            first = torch.autograd.grad(
                (outputs * outputs).sum(), (images, each), create_graph=True
            )
            second = torch.autograd.grad(sum((x * x).sum() for x in first), (images, each))
            found.append([outputs, *first, *second])
    finally:
        torch.set_num_threads(threads)
    for values in zip(*found, strict=True):
        assert all(torch.equal(values[0], other) for other in values)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4, track_running_stats=False), nn.LayerNorm(4)])
def test_vmap_over_normalisation_is_still_wrong_upstream(norm: nn.Module) -> None:
    """Why this engine has layers of its own instead of ``torch.func.vmap`` over the model.

    In torch 2.13, gradients taken inside ``vmap`` and differentiated outside it are silently wrong
    where an affine normalisation layer's input depends on parameters; the losses are right.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), norm).double()
    theta = dict(model.named_parameters())
    x, target = torch.randn(3, 6, 3, dtype=torch.float64), torch.randint(4, (3, 6))

    def loss(weights: dict, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, weights, (x,)), target)

    def after_step(weights: dict, x: Tensor, target: Tensor) -> Tensor:
        gradient = torch.func.grad(loss)(weights, x, target)
        return loss({n: w - 0.4 * gradient[n] for n, w in weights.items()}, x, target)

    def meta_gradient(losses: Tensor) -> dict:
        gradient = torch.autograd.grad(losses.sum(), list(theta.values()))
        return dict(zip(theta, gradient, strict=True))

    mapped = torch.func.vmap(after_step, in_dims=(None, 0, 0))(theta, x, target)
    looped = torch.stack([after_step(theta, *task) for task in zip(x, target, strict=True)])
    torch.testing.assert_close(mapped, looped, rtol=1e-12, atol=1e-12)
    error = relative_error(meta_gradient(mapped), meta_gradient(looped))
    assert error > 1e-6, (
        f"torch {torch.__version__} has this right (relative error {error:.0e}): vmap over "
        "normalisation layers has been fixed, and layers that exist to avoid it may go"
    )


# What a compiled kernel would take on trust.


@pytest.mark.parametrize("rectifier", [nn.LeakyReLU(0.3, inplace=True), nn.ReLU(inplace=True)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["anil", "maml"])
def test_a_layer_that_writes_in_place_changes_nothing(
    name: str, bias: bool, rectifier: nn.Module
) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, bias=bias), rectifier, nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(4, 3)).double()
    batch = make_batch((1, 8, 8))
    batched, higher = both(name, model, inner_steps=3)
    assert_same_scores(batched.evaluate(batch), higher.evaluate(batch))
    assert_same_scores(batched.meta_backward(batch), higher.meta_backward(batch))
    assert_same_gradients(batched, higher)


def test_images_smaller_than_the_kernel_are_left_to_the_reference_to_refuse() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 3)).double()
    maml = algorithms.create("maml", model)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        maml.meta_backward(make_batch((1, 2, 2)))
    assert "larger than images" in maml.engine_reason


@pytest.mark.parametrize(
    ("images", "kernels"),
    [
        (torch.ones(2, 3, 3, 3), torch.ones(2, 1, 1, 3, 3)),
        (torch.ones(2, 1, 3, 3), torch.ones(2, 1, 3, 3, 3)),
        (torch.ones(2, 1, 3, 3).double(), torch.ones(2, 1, 1, 3, 3)),
        (torch.ones(3, 1, 3, 3), torch.ones(2, 1, 1, 3, 3)),
        (torch.ones(2, 1, 2, 2), torch.ones(2, 1, 1, 3, 3)),
    ],
)
def test_what_does_not_fit_is_not_convolved(images: Tensor, kernels: Tensor) -> None:
    window = Window((3, 3), (1, 1), (1, 1), (0, 0), (0, 0))
    with pytest.raises(ValueError, match=r"fit one another|images are|larger than"):
        convolution(images, kernels, window)


def test_no_images_have_no_outputs() -> None:
    window = Window((3, 3), (1, 1), (1, 1), (0, 0), (0, 0))
    assert convolution(torch.ones(0, 1, 5, 5), torch.ones(2, 4, 1, 3, 3), window).shape == (
        0,
        4,
        3,
        3,
    )


@pytest.mark.parametrize("weight", [torch.ones(2, 1, 4), torch.ones(2, 1, 8).double()])
def test_a_scale_that_does_not_fit_does_not_scale(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="scale and shift are"):
        normalise(torch.randn(2, 4, 8), 1e-5, weight, None, relu=False)


def test_what_overflows_in_normalisation_is_seen() -> None:
    rows = torch.tensor([[[-1.0], [1.0]]])
    weight = torch.full((1, 1, 1), torch.inf)
    found = normalise(rows, 1e-5, weight, None, relu=False)
    assert found.flatten().tolist() == [-torch.inf, torch.inf]
    assert normalise(rows, 1e-5, weight, None, relu=True).flatten().tolist() == [0, torch.inf]


def test_an_index_beyond_an_embedding_is_not_another_tasks_row() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3)).double()
    maml = algorithms.create("maml", model, engine="batched")
    inputs = torch.zeros(2, 3, 2, dtype=torch.int64)
    targets = torch.arange(3).expand(2, 3)
    inputs[0, 0, 0] = 5
    with pytest.raises((IndexError, algorithms.AlgorithmError), match="index"):
        maml.meta_backward({"train": (inputs, targets), "test": (inputs, targets)})


def test_kernels_that_cannot_be_loaded_are_done_without(tmp_path: Path, monkeypatch) -> None:
    broken = tmp_path / "cut-short.so"
    broken.write_bytes(b"")
    monkeypatch.setattr(kernels, "built", lambda name: broken)
    assert kernels.missing().startswith(f"cannot load {broken}")


def test_engines_are_compared_where_they_are_asked_to_be() -> None:
    model, batch = models.build("fc", SHAPES["fc"], 3, seed=0), make_batch(SHAPES["fc"])
    state = algorithms.create("maml", model).state_dict()
    assert verify("maml", model, batch, {}, state=state) < 1e-10
    nowhere = {n: v * float("nan") if v.is_floating_point() else v for n, v in state.items()}
    with pytest.raises(algorithms.AlgorithmError):
        verify("maml", model, batch, {}, state=nowhere)
