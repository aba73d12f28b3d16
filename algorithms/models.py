"""The networks of the papers, with their initialisations.

Weights are drawn from Glorot's uniform distribution and biases are zero, as in the code of Finn et
al. 2017, except in ``conv4``, which is the network as it is usually written in torch and starts as
torch's layers do: batch normalisation makes a step in a weight the larger the smaller the weight
is, and from torch's smaller ones MAML with alpha = 0.4 is ten points ahead after 160 meta-steps on
Omniglot. Batch normalisation has a shift but no scale, and its shift is meta-learned without
adapting in the inner loop (``outer_only``), as in that code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from algorithms.base import AlgorithmError


class EpisodicNet(nn.Module):
    """A body that makes features, and a linear head.

    Args:
        body: a module from ``(n, *sample_shape)`` to ``(n, features)``.
        features: how many.
        outputs: classes, or the size of a regression target.
    """

    def __init__(self, body: nn.Module, features: int, outputs: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(features, outputs)

    @property
    def outer_only(self) -> frozenset[str]:
        """Parameters that are meta-learned but do not adapt: batch normalisation's shifts."""
        return frozenset(
            f"{name}.bias"
            for name, module in self.named_modules()
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs ``(n, outputs)`` for inputs ``(n, *sample_shape)``."""
        outputs: Tensor = self.head(self.body(inputs))
        return outputs


class SpatialMean(nn.Module):
    """The mean over height and width: ``(n, c, h, w)`` to ``(n, c)``."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.mean((2, 3))


Network = Callable[[tuple[int, ...], int], nn.Module]
"""Makes a network from inputs ``(n, *sample_shape)`` to outputs ``(n, outputs)``, its weights drawn
by torch's generator."""
MODELS: dict[str, Network] = {}
N = TypeVar("N", bound=Network)


def register(name: str) -> Callable[[N], N]:
    """Decorator: make a function ``(sample_shape, outputs)`` that returns a network known as
    ``--model`` ``name``.

    Raises:
        AlgorithmError: another has the name.
    """

    def add(network: N) -> N:
        known = MODELS.get(name, network)
        # A file that is run again brings the same function again.
        if (known.__module__, known.__qualname__) != (network.__module__, network.__qualname__):
            raise AlgorithmError(f"two models are called {name!r}")
        MODELS[name] = network
        return network

    return add


@register("conv4")
def conv4(sample_shape: tuple[int, ...], outputs: int) -> EpisodicNet:
    """The Omniglot network: four 3x3 convolutions of 64 filters and stride 2, features flattened
    (Vinyals et al. 2016; Finn et al. 2017, section 5.2)."""
    channels, *size = sample_shape
    body = nn.Sequential(*_strided_blocks(channels, filters=64), nn.Flatten())
    return EpisodicNet(body, 64 * math.prod(-(-side // 16) for side in size), outputs)


@register("conv4_mean")
def conv4_mean(sample_shape: tuple[int, ...], outputs: int) -> EpisodicNet:
    """The Omniglot network as the MAML paper's code has it: the features are the spatial mean of
    the last layer (64), and the head is drawn from N(0, 1)."""
    body = nn.Sequential(*_strided_blocks(sample_shape[0], filters=64), SpatialMean())
    model = _glorot(EpisodicNet(body, 64, outputs))
    nn.init.normal_(model.head.weight)
    return model


@register("conv4_pool")
def conv4_pool(sample_shape: tuple[int, ...], outputs: int) -> EpisodicNet:
    """The miniImageNet network: four 3x3 convolutions of 32 filters, each followed by 2x2 max
    pooling (Ravi and Larochelle 2017; Finn et al. 2017); 84x84 gives 800 features."""
    channels, *size = sample_shape
    blocks: list[nn.Module] = []
    for inputs in (channels, 32, 32, 32):
        blocks += [*_block(inputs, 32, stride=1), nn.MaxPool2d(2)]
    body = nn.Sequential(*blocks, nn.Flatten())
    return _glorot(EpisodicNet(body, 32 * math.prod(side // 16 for side in size), outputs))


@register("conv4_leaky")
def conv4_leaky(sample_shape: tuple[int, ...], outputs: int) -> EpisodicNet:
    """The Omniglot network of MAML++: four 3x3 convolutions of 64 filters with leaky rectifiers,
    each followed by 2x2 max pooling (Antoniou et al. 2019); 28x28 gives 64 features."""
    channels, *size = sample_shape
    blocks: list[nn.Module] = []
    for inputs in (channels, 64, 64, 64):
        convolution, norm, _ = _block(inputs, 64, stride=1)
        blocks += [convolution, norm, nn.LeakyReLU(), nn.MaxPool2d(2)]
    body = nn.Sequential(*blocks, nn.Flatten())
    return _glorot(EpisodicNet(body, 64 * math.prod(side // 16 for side in size), outputs))


@register("fc")
def fc(sample_shape: tuple[int, ...], outputs: int) -> EpisodicNet:
    """The fully connected Omniglot network: layers of 256, 128, 64 and 64, each with batch
    normalisation and ReLU (Finn et al. 2017, section 5.2)."""
    widths = (math.prod(sample_shape), 256, 128, 64, 64)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, width in pairwise(widths):
        layers += [nn.Linear(inputs, width, bias=False), _shift(nn.BatchNorm1d(width)), nn.ReLU()]
    return _glorot(EpisodicNet(nn.Sequential(*layers), 64, outputs))


@register("mlp")
def mlp(sample_shape: tuple[int, ...], outputs: int) -> EpisodicNet:
    """The sinusoid network: two hidden layers of 40 with ReLU (Finn et al. 2017, section 5.1)."""
    inputs = math.prod(sample_shape)
    body = nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU()
    )
    return _glorot(EpisodicNet(body, 40, outputs))


OF_PICTURES = {"conv4": 1, "conv4_mean": 1, "conv4_pool": 16, "conv4_leaky": 16}
"""How many pixels a side a picture must have: some networks halve it four times."""


def usual(sample_shape: tuple[int, ...]) -> str:
    """The name of the network that the papers use for samples of this shape."""
    if len(sample_shape) < 3:
        return "mlp"
    return "conv4" if sample_shape[0] == 1 else "conv4_pool"


def build(name: str, sample_shape: tuple[int, ...], outputs: int, seed: int) -> nn.Module:
    """A network, its weights a function of the seed alone; torch's generator is left as it was.

    Raises:
        AlgorithmError: an unknown name, or a network that such samples do not fit.
    """
    if name not in MODELS:
        raise AlgorithmError(f"no model is called {name!r}; there are {', '.join(MODELS)}")
    pictures = len(sample_shape) == 3
    if name in OF_PICTURES and not (pictures and min(sample_shape[1:]) >= OF_PICTURES[name]):
        raise AlgorithmError(f"{name} does not fit samples of shape {sample_shape}")
    with drawing(seed):
        return MODELS[name](sample_shape, outputs)


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """What is drawn on the CPU within is a function of the seed; torch's generator, and those of
    other devices, are left as they were."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


def _glorot(model: EpisodicNet) -> EpisodicNet:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def _strided_blocks(channels: int, filters: int) -> list[nn.Module]:
    return [
        layer
        for inputs in (channels, filters, filters, filters)
        for layer in _block(inputs, filters, stride=2)
    ]


def _block(inputs: int, filters: int, stride: int) -> tuple[nn.Module, ...]:
    # No bias: batch normalisation takes it out again.
    convolution = nn.Conv2d(inputs, filters, 3, stride, padding=1, bias=False)
    return convolution, _shift(nn.BatchNorm2d(filters)), nn.ReLU()


def _shift(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> nn.Module:
    norm.register_parameter("weight", None)
    return norm
