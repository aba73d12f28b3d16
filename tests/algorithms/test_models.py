"""The networks are the papers'."""

import pytest
import torch
from torch import nn

from algorithms import AlgorithmError, models


@pytest.mark.parametrize(
    ("name", "sample_shape", "features"),
    [
        ("conv4", (1, 28, 28), 256),
        ("conv4_mean", (1, 28, 28), 64),
        ("conv4_pool", (3, 84, 84), 800),
        ("conv4_pool", (3, 32, 32), 128),
        ("conv4_leaky", (1, 28, 28), 64),
        ("fc", (1, 28, 28), 64),
        ("mlp", (1,), 40),
    ],
)
def test_features_and_outputs(name: str, sample_shape: tuple[int, ...], features: int) -> None:
    model = models.build(name, sample_shape, 5, seed=0)
    inputs = torch.randn(3, *sample_shape)
    assert model.body(inputs).shape == (3, features)
    assert model(inputs).shape == (3, 5)


def test_parameter_counts() -> None:
    def count(name: str, shape: tuple[int, ...], outputs: int) -> int:
        return sum(p.numel() for p in models.build(name, shape, outputs, 0).parameters())

    filters, pooled = 64, 32
    assert count("conv4", (1, 28, 28), 5) == 9 * 64 + 3 * 9 * 64**2 + 4 * filters + 257 * 5
    assert count("conv4_pool", (3, 84, 84), 5) == 27 * 32 + 3 * 9 * 32**2 + 4 * pooled + 801 * 5
    assert count("mlp", (1,), 1) == 2 * 40 + 41 * 40 + 41


def test_initialisation_is_glorots_with_zero_biases_and_a_normal_head_for_the_mean_net() -> None:
    model = models.build("conv4_mean", (1, 28, 28), 5, seed=0)
    weight = model.body[3].weight
    bound = (6 / (9 * 64 + 9 * 64)) ** 0.5
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert model.head.bias.abs().sum() == 0
    assert models.build("conv4_mean", (1, 28, 28), 20, 0).head.weight.std().item() == pytest.approx(
        1, rel=0.1
    )


def test_conv4_starts_as_torchs_layers_do() -> None:
    """Uniform in 1 / sqrt(inputs of an output): Glorot's of the second layer would be wider."""
    model = models.build("conv4", (1, 28, 28), 5, seed=0)
    for layer in (module for module in model.modules() if hasattr(module, "weight")):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            bound = layer.weight[0].numel() ** -0.5
            assert 0.95 * bound < layer.weight.abs().max() <= bound
    assert model.head.bias.any()


def test_weights_are_a_function_of_the_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (models.build("fc", (1, 28, 28), 5, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_batch_norms_shift_is_learned_by_the_outer_loop_alone() -> None:
    model = models.build("conv4", (1, 28, 28), 5, seed=0)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.weight is None and norm.bias is not None for norm in norms)
    assert model.outer_only == {f"body.{i}.bias" for i in (1, 4, 7, 10)}


def test_a_name_is_one_networks() -> None:
    with pytest.raises(AlgorithmError, match="two models are called 'fc'"):
        models.register("fc")(models.mlp)
    assert models.register("fc")(models.fc) is models.fc


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(AlgorithmError, match="does not fit"):
        models.build("conv4_pool", (1, 12, 12), 5, 0)
    with pytest.raises(AlgorithmError, match="no model is called 'resnet'"):
        models.build("resnet", (1, 28, 28), 5, 0)
