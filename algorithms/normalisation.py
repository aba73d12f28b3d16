"""Batch normalisation in an episode: whose statistics normalise a query sample.

The four modes and their names are those of Bronskill et al. 2020 (TaskNorm, section 3), who show
that the choice moves accuracy by more than most algorithms do:

- ``transductive``: the statistics of the batch in hand, so a query sample's prediction depends on
  the other query samples. What the MAML paper's code does.
- ``support``: the support set's statistics, for the query set too.
- ``single``: each query sample together with the support set alone, one query at a time. Reptile's
  "non-transductive" evaluation.
- ``running``: averages gathered in meta-training, as ``nn.BatchNorm`` does in evaluation.
"""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from algorithms.precision import unrounded

MODES = ("transductive", "support", "single", "running")


class Forward(Protocol):
    """Runs a model on samples ``(tasks, n, *sample_shape)`` and gives ``(tasks, n, out)``.

    A task's samples are ``groups`` sets side by side, and the first ``counted`` of each set (None:
    all of them) give the statistics.
    """

    def __call__(
        self, inputs: Tensor, *, groups: int = 1, counted: int | None = None
    ) -> Tensor: ...


class Statistics:
    """Which samples of a forward pass the batch-norm layers of one model take statistics from.

    The layers hold it by reference, so that setting it here reaches all of them.

    Attributes:
        groups: how many independent groups the batch is made of, side by side.
        counted: the share of each group's rows, from its first, that is counted: as of its samples,
            of which a model may make several rows each; None counts all.
        running: normalise by the running averages instead.
        gather: note each layer's batch statistics, for the running averages.
    """

    def __init__(self) -> None:
        self.groups = 1
        self.counted: Fraction | None = None
        self.running = False
        self.gather = False


class EpisodicBatchNorm(nn.Module):
    """Stands in for a ``nn.BatchNorm`` layer, with its parameters and its running averages."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, layer: _BatchNorm, statistics: Statistics) -> None:
        super().__init__()
        self.register_parameter("weight", layer.weight)
        self.register_parameter("bias", layer.bias)
        self.eps = layer.eps
        self.statistics = statistics
        self.averages = RunningAverages(layer)

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise ``(groups * n, channels, *spatial)``."""
        given = self.statistics
        inputs = unrounded(inputs)
        if given.running:
            mean, var = self.averages.mean, self.averages.var
            return F.batch_norm(inputs, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        if given.gather:
            self.averages.note(inputs.detach())
        if given.groups == 1 and given.counted is None:
            return F.batch_norm(inputs, None, None, self.weight, self.bias, True, 0.0, self.eps)
        grouped = inputs.view(given.groups, -1, *inputs.shape[1:])
        share = given.counted
        counted = grouped if share is None else grouped[:, : int(share * grouped.shape[1])]
        samples_and_space = (1, *range(3, grouped.dim()))
        var, mean = torch.var_mean(counted, samples_and_space, correction=0, keepdim=True)
        outputs = ((grouped - mean) * torch.rsqrt(var + self.eps)).view_as(inputs)
        channels = (1, -1, *(1,) * (inputs.dim() - 2))
        if self.weight is not None:
            outputs = outputs * self.weight.view(channels)
        if self.bias is not None:
            outputs = outputs + self.bias.view(channels)
        return outputs


class RunningAverages:
    """A layer's running mean and variance, moved once a meta-step.

    All forward passes of a meta-step count alike, whatever order its tasks are taken in, and the
    averages move by their mean. Not a module, so that copies of a layer share it.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        self.mean: Tensor | None = layer.running_mean
        self.var: Tensor | None = layer.running_var
        self.batches: Tensor | None = layer.num_batches_tracked
        self.momentum = layer.momentum
        self.noted: list[tuple[Tensor, Tensor]] = []

    def note(self, inputs: Tensor) -> None:
        """Keep the mean and the unbiased variance of a batch until :meth:`move`."""
        dims = (0, *range(2, inputs.dim()))
        var, mean = torch.var_mean(inputs, dims, correction=1)
        self.noted.append((mean, var))

    def move(self) -> None:
        """Move the averages, in place, towards what was noted."""
        if not self.noted or self.mean is None or self.var is None or self.batches is None:
            return
        mean, var = (torch.stack(values).mean(0) for values in zip(*self.noted, strict=True))
        self.noted.clear()
        self.batches += 1
        weight = 1 / self.batches.item() if self.momentum is None else self.momentum
        self.mean.lerp_(mean, weight)
        self.var.lerp_(var, weight)


def hooked(module: nn.Module) -> bool:
    """Whether code of other hands runs before or after its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def copied(model: nn.Module, already: dict[int, Any]) -> nn.Module:
    """A deep copy of a model; what is in ``already`` by its id is taken from there.

    Raises:
        ValueError: it cannot be copied.
    """
    try:
        return copy.deepcopy(model, already)
    except RuntimeError as error:  # a tensor with a graph behind it, as an attribute
        line = " ".join(str(error).split())
        raise ValueError(f"the model cannot be copied: {line}") from error


class EpisodicNorm:
    """One model's batch normalisation in one mode.

    Args:
        model: any module; it is left as it is.
        mode: one of :data:`MODES`.

    Attributes:
        model: a copy of the module's structure over the same parameters and buffers, with its
            batch-norm layers replaced.

    Raises:
        ValueError: a model that cannot be copied, an unknown mode, ``running`` where a layer keeps
            no running averages, or batch normalisation with a forward or hooks of its own.
    """

    def __init__(self, model: nn.Module, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"norm is {mode!r}; it must be one of {', '.join(MODES)}")
        self.mode = mode
        self.statistics = Statistics()
        shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self.model = self._replace(copied(model, shared), {})
        self.layers = [m for m in self.model.modules() if isinstance(m, EpisodicBatchNorm)]
        if mode == "running" and any(layer.averages.mean is None for layer in self.layers):
            raise ValueError("norm 'running' needs batch norm with track_running_stats=True")

    def _replace(self, module: nn.Module, replaced: dict[int, nn.Module]) -> nn.Module:
        """The module with its batch norm replaced, once where it is there several times."""
        if isinstance(module, _BatchNorm):
            plain = type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
            if not plain or hooked(module):
                raise ValueError(
                    f"{type(module).__name__} is batch normalisation with a forward or hooks of "
                    "its own, and there is no telling whose statistics it uses"
                )
            return EpisodicBatchNorm(module, self.statistics)
        for name, child in module._modules.items():
            if child is not None:
                if id(child) not in replaced:
                    replaced[id(child)] = self._replace(child, replaced)
                module._modules[name] = replaced[id(child)]
        return module

    def start(self, training: bool) -> None:
        """Begin a meta-step (``training``) or an evaluation."""
        self.statistics.running = self.mode == "running" and not training
        self.statistics.gather = self.mode == "running" and training

    def finish(self) -> None:
        """End a meta-step: move the running averages where they are what the mode uses."""
        for layer in self.layers:
            layer.averages.move()

    def count(self, samples: int, groups: int, counted: int | None) -> None:
        """Say which of a task's samples have their statistics taken in the forward pass to come."""
        self.statistics.groups = groups
        self.statistics.counted = None if counted is None else Fraction(counted * groups, samples)

    def query(self, forward: Forward, support: Tensor, query: Tensor) -> Tensor:
        """Outputs for query sets, normalised as the mode says.

        Args:
            forward: runs the model.
            support: ``(tasks, n, *sample_shape)``.
            query: ``(tasks, m, *sample_shape)``.

        Returns:
            ``(tasks, m, out)``.
        """
        shots, queries = support.shape[1], query.shape[1]
        if self.mode in ("transductive", "running") or not self.layers:
            return forward(query)
        if self.mode == "support":
            return forward(torch.cat([support, query], dim=1), counted=shots)[:, shots:]
        beside = support[:, None].expand(-1, queries, *support.shape[1:])
        groups = torch.cat([beside, query[:, :, None]], dim=2)
        return forward(groups.flatten(1, 2), groups=queries)[:, shots :: shots + 1]
