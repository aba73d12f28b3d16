"""Is an engine's meta-gradient the reference's? Asked of a batch, in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.base import Batch, create


def verify(
    name: str,
    model: nn.Module,
    batch: Batch,
    settings: Mapping[str, Any],
    *,
    engine: str = "batched",
    state: Mapping[str, Tensor] | None = None,
) -> float:
    """How far an engine's meta-gradient is from that of ``higher``.

    Both engines run on float64 copies of the model, from the same state of torch's generator,
    which is left as it was.

    Args:
        name: the algorithm's.
        model: left as it is.
        batch: torchmeta's batch.
        settings: hyperparameters, as for :func:`algorithms.create`; an ``engine`` is ignored, and
            the reference does not checkpoint; neither is recorded.
        engine: the one in question.
        state: an :meth:`algorithms.Algorithm.state_dict` to ask at; None for where a training
            begins.

    Returns:
        The relative error ``|g - h| / |h|`` over all meta-parameters. Agreement is about 1e-14;
        1e-8 is a generous bound.

    Raises:
        AlgorithmError: the engine cannot run the model.
    """
    gradients = []
    for each in (engine, "higher"):
        twin = copy.deepcopy(model).double()
        devices = {p.device for p in twin.parameters() if p.device.type == "cuda"}
        here = {**settings, "engine": each}
        if each == "higher" and here.get("checkpoint_inner"):
            here["checkpoint_inner"] = False
        with torch.random.fork_rng(devices=list(devices)):
            torch.manual_seed(0)
            algorithm = create(name, twin, **here)
            algorithm.cuda_graphs = False
            if state is not None:
                algorithm.load_state_dict(state)
            algorithm.meta_backward(batch)
        parts = [p.grad.flatten() for p in algorithm.parameters() if p.grad is not None]
        gradients.append(torch.cat(parts) if parts else torch.zeros(1).double())
    found, expected = gradients
    return float((found - expected).norm() / expected.norm().clamp_min(1e-300))
