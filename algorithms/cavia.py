"""CAVIA: Zintgraf, Shiarlis, Kurin, Hofmann and Whiteson 2019, Fast Context Adaptation via
Meta-Learning (arXiv 1810.03642)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from algorithms.base import AlgorithmError, head_names, register, replaced
from algorithms.maml import MAML


@register("cavia")
class CAVIA(MAML):
    """MAML that adapts context parameters, an input of the network, and leaves theta to the outer
    loop.

    A context phi of a few numbers starts at zero in every task and takes the inner steps,
    phi_i = phi - alpha grad_phi L_support_i(phi, theta) (equation 2); the meta-gradient is
    grad_theta of the mean of L_query_i(phi_i, theta) (equation 3), through those steps.

    The context enters the network where it does in the paper's classifiers (section 3.4): it scales
    and shifts the channels of one layer, FiLM(h) = (1 + gamma) h + beta, with gamma and beta linear
    in phi. The layer is the one before the body's last weights: behind the third convolution of
    four and its batch norm, and behind the first hidden layer of two, where a shift is what the
    paper's regression has, a context put beside the inputs. The linear map is meta-learned; its
    weights start as torch's, and its biases at zero, so that phi = 0 changes nothing. (The paper's
    code has gamma h + beta, and biases that start as torch's too.)

    Args:
        model: any module, as for :class:`algorithms.Algorithm`, with layers before its head whose
            outputs are ``(n, channels, ...)``.
        contexts: how many numbers phi has.
        settings: those of :class:`algorithms.Algorithm`.
    """

    summary = "MAML that adapts an input of the network, not its weights (Zintgraf et al. 2019)"
    defaults = {
        # The paper's 1.0 is for 60,000 iterations; in 150 it does not leave chance on glyphs.
        "*": {"inner_lr": 50.0, "inner_steps": 2},
        "sinusoid": {**MAML.defaults["sinusoid"], "inner_lr": 1.0, "contexts": 5},
    }

    def __init__(self, model: nn.Module, *, contexts: int = 100, **settings: Any) -> None:
        if not contexts >= 1:
            raise AlgorithmError(f"contexts is {contexts}; it must be positive")
        self.contexts = contexts
        super().__init__(model, **settings)
        mine = {id(parameter) for parameter in self.film.parameters()}
        self.meta_parameters = {
            name: value for name, value in self.meta_parameters.items() if id(value) not in mine
        }
        self.beside = {f"film.{name}": p for name, p in self.film.generator.named_parameters()}

    def made_network(self) -> nn.Module:
        place = modulated_layer(self.model)
        like = next(self.model.parameters())
        self.film = FiLM(_channels(place), self.contexts).to(like)
        return replaced(self.model, place, nn.Sequential(place, self.film))

    def adapted(self) -> list[str]:
        context = self.film.context.weight
        return [name for name, value in self.network.named_parameters() if value is context]


class FiLM(nn.Module):
    """Scales and shifts channels as a context says: Perez et al. 2018 (arXiv 1709.07871).

    Made of layers that the inner loop knows: the context is an embedding's only row.

    Args:
        channels: of the features that are scaled and shifted.
        contexts: how many numbers the context has.
    """

    def __init__(self, channels: int, contexts: int) -> None:
        super().__init__()
        self.context = nn.Embedding(1, contexts, _weight=torch.zeros(1, contexts))
        self.generator = nn.Linear(contexts, 2 * channels)
        nn.init.zeros_(self.generator.bias)

    def forward(self, features: Tensor) -> Tensor:
        """``(n, channels, ...)``, modulated."""
        row = torch.zeros(len(features), dtype=torch.int64, device=features.device)
        scale_and_shift = self.generator(self.context(row))
        scale, shift = (
            each.view(*each.shape, *(1,) * (features.dim() - 2))
            for each in scale_and_shift.chunk(2, dim=1)
        )
        modulated: Tensor = (1 + scale) * features + shift
        return modulated


def modulated_layer(model: nn.Module) -> nn.Module:
    """The layer that a context modulates: the last with parameters before the body's last weights.

    Raises:
        AlgorithmError: a model with fewer than two layers of weights before its head.
    """
    head = set(head_names(model))
    names = {id(value): name for name, value in model.named_parameters()}
    layers = [
        module
        for module in model.modules()
        if (own := list(module.parameters(recurse=False))) and names[id(own[0])] not in head
    ]
    weighted = [i for i, layer in enumerate(layers) if _is_weighted(layer)]
    if len(weighted) < 2:
        raise AlgorithmError("cavia needs two layers of weights before the head to stand between")
    return layers[weighted[-1] - 1]


def _is_weighted(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() > 1


def _channels(layer: nn.Module) -> int:
    for attribute in ("num_features", "out_channels", "out_features", "num_channels"):
        if hasattr(layer, attribute):
            return int(getattr(layer, attribute))
    raise AlgorithmError(f"cavia cannot tell how many channels {type(layer).__name__} has")
