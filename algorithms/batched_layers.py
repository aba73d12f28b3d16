"""Layers over many tasks at once: every task's samples in one batch, each task with its weights.

A layer here receives the samples of ``T`` tasks side by side, ``(T * n, ...)``, as its original
would receive those of one, and takes its weights, ``(T, *shape)``, from the :class:`TaskWeights`
that all layers of a model share. Everything between the layers, a model's own ``forward``
included, acts on each sample alone and needs no change.

Layers over channels leave their outputs in channels-last memory, in which a patch's rows and a
channel's statistics are read in order (:mod:`algorithms.task_convolutions`,
:mod:`algorithms.task_normalisation`). Nothing uses ``torch.func.vmap``,
whose rules for normalisation layers have wrong second derivatives.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algorithms.inner_loop import generator_state
from algorithms.kernels import Windows
from algorithms.normalisation import EpisodicBatchNorm, Statistics, hooked
from algorithms.precision import unrounded
from algorithms.task_convolutions import Window, convolution
from algorithms.task_normalisation import normalise, pools

L = TypeVar("L", bound=nn.Module)


class TaskWeights:
    """The weights that a model's layers use in a forward pass, held by reference by all of them.

    Attributes:
        fast: every parameter by its name in the model, ``(tasks, *shape)``.
        tasks: how many tasks the batch is made of, side by side.
        channels_last: layers over channels may leave their outputs in channels-last memory.
        remember: keep what the parts that do not adapt make of data; see :class:`FixedPart`.
    """

    def __init__(self) -> None:
        self.fast: dict[str, Tensor] = {}
        self.tasks = 1
        self.channels_last = True
        self.remember = False

    def laid_out(self, channels_first: Tensor) -> Tensor:
        """A layer's output, copied where its memory may not be channels-last."""
        return channels_first if self.channels_last else channels_first.contiguous()


class TaskLayer(nn.Module):
    """Stands in for a layer with parameters.

    Args:
        layer: the original.
        names: the names in the model of the layer's parameters, by attribute.
        weights: where their values are.
    """

    def __init__(self, layer: nn.Module, names: dict[str, str], weights: TaskWeights) -> None:
        super().__init__()
        self.names = names
        self.weights = weights

    def value(self, attribute: str) -> Tensor | None:
        """A parameter of every task, ``(tasks, *shape)``; None where the layer has none."""
        return self.weights.fast[self.names[attribute]] if attribute in self.names else None

    def affine(self, outputs: Tensor, channels: Callable[[Tensor], Tensor]) -> Tensor:
        """Scale and shift; ``channels`` gives a parameter the shape that broadcasts."""
        weight, bias = self.value("weight"), self.value("bias")
        if weight is not None and bias is not None:
            return torch.addcmul(channels(bias), outputs, channels(weight))
        if weight is not None:
            outputs = outputs * channels(weight)
        return outputs if bias is None else outputs + channels(bias)


class TaskLinear(TaskLayer):
    """``nn.Linear``."""

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.reshape(self.weights.tasks, -1, inputs.shape[-1])
        weight = self.value("weight")
        assert weight is not None
        outputs = products(rows, weight, self.value("bias"))
        return outputs.view(*inputs.shape[:-1], -1)


class TaskConv(TaskLayer):
    """``nn.Conv2d``, and ``nn.Conv1d`` as images of height 1."""

    def __init__(
        self, layer: nn.Conv1d | nn.Conv2d, names: dict[str, str], weights: TaskWeights
    ) -> None:
        super().__init__(layer, names, weights)
        self.flat = isinstance(layer, nn.Conv1d)
        # The padding that "same" asks for may differ on the two sides of a dimension.
        before = layer._reversed_padding_repeated_twice[-2::-2]
        after = layer._reversed_padding_repeated_twice[-1::-2]

        def both(values: Any, missing: int) -> tuple[int, int]:
            height_and_width = (missing, *values) if self.flat else tuple(values)
            return (int(height_and_width[0]), int(height_and_width[1]))

        self.window = Window(
            kernel=both(layer.kernel_size, 1),
            stride=both(layer.stride, 1),
            dilation=both(layer.dilation, 1),
            before=both(before, 0),
            after=both(after, 0),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        weight = self.value("weight")
        assert weight is not None
        if self.flat:
            inputs, weight = inputs.unsqueeze(-2), weight.unsqueeze(-2)
        outputs = convolution(inputs, weight, self.window)
        bias = self.value("bias")
        if bias is not None:
            by_task = outputs.view(self.weights.tasks, -1, *outputs.shape[1:])
            outputs = (by_task + bias[:, None, :, None, None]).flatten(0, 1)
        return self.weights.laid_out(outputs.squeeze(-2) if self.flat else outputs)


class TaskBatchNorm(TaskLayer):
    """:class:`EpisodicBatchNorm`, whose averages and choice of statistics it shares."""

    def __init__(
        self, layer: EpisodicBatchNorm, names: dict[str, str], weights: TaskWeights
    ) -> None:
        super().__init__(layer, names, weights)
        self.eps = layer.eps
        self.statistics = layer.statistics
        self.averages = layer.averages

    def forward(
        self, inputs: Tensor, *, relu: bool = False, pool: nn.MaxPool2d | None = None
    ) -> Tensor:
        """Normalise ``(tasks * groups * n, channels, *spatial)``, and rectify and pool if asked
        to."""
        given, tasks = self.statistics, self.weights.tasks
        rows = unrounded(inputs).movedim(1, -1)
        grouped = rows.reshape(tasks * given.groups, -1, rows.shape[-1])
        windows = None
        if given.running or given.counted is not None:
            outputs = self._by_given(grouped)
            outputs = outputs.relu() if relu else outputs
        else:
            if given.gather:
                self._note(grouped.detach())
            affine = self._grouped("weight"), self._grouped("bias")
            windows = None if pool is None else _windows(pool, rows)
            outputs = normalise(grouped, self.eps, *affine, relu=relu, windows=windows)
        size = rows.shape[1:-1] if windows is None else windows.size
        pixels = outputs.view(len(rows), *size, rows.shape[-1])
        found = self.weights.laid_out(pixels.movedim(-1, 1))
        return found if pool is None or windows is not None else pool(found)

    def _by_given(self, grouped: Tensor) -> Tensor:
        """Normalised by running averages, or by the statistics of a group's first samples."""
        if self.statistics.running:
            assert self.averages.mean is not None
            assert self.averages.var is not None
            mean, var = self.averages.mean, self.averages.var
        else:
            assert self.statistics.counted is not None
            counted = grouped[:, : int(self.statistics.counted * grouped.shape[1])]
            mean = counted.mean(1, keepdim=True)
            var = (counted - mean).square().mean(1, keepdim=True)
        normalised = (grouped - mean) * torch.rsqrt(var + self.eps)
        by_task = normalised.view(self.weights.tasks, -1, grouped.shape[-1])
        return self.affine(by_task, lambda value: value[:, None])

    def _grouped(self, attribute: str) -> Tensor | None:
        """A parameter of every group, ``(tasks * groups, 1, channels)``."""
        value = self.value(attribute)
        if value is None:
            return None
        each = value[:, None].expand(-1, self.statistics.groups, -1)
        return each.reshape(-1, 1, value.shape[-1])

    def _note(self, rows: Tensor) -> None:
        var, mean = torch.var_mean(rows, 1, correction=1)
        self.averages.noted.extend(zip(mean, var, strict=True))


class TaskSequential(nn.Sequential):
    """``nn.Sequential``, in which batch normalisation, a rectifier right after it and a pooling
    after that are one."""

    def forward(self, inputs: Tensor) -> Tensor:
        layers = deque(self)
        while layers:
            layer = layers.popleft()
            if isinstance(layer, TaskBatchNorm):
                relu = _next(layers, nn.ReLU) is not None
                pool = _next(layers, nn.MaxPool2d)
                inputs = TaskBatchNorm.forward(layer, inputs, relu=relu, pool=pool)
            else:
                inputs = layer(inputs)
        return inputs


def _next(layers: deque[nn.Module], kind: type[L]) -> L | None:
    """The layer that comes next, taken away, if it is just of this kind."""
    if layers and type(layers[0]) is kind and not hooked(layers[0]):
        return cast("L", layers.popleft())
    return None


def _windows(pool: nn.MaxPool2d, pixels: Tensor) -> Windows | None:
    """The windows of pixels ``(n, height, width, channels)`` that a pooling takes the highest of;
    None where they do not lie side by side, or are not taken along with normalisation."""
    window, stride = _pair(pool.kernel_size), _pair(pool.stride)
    plain = (_pair(pool.padding), _pair(pool.dilation), pool.ceil_mode) == ((0, 0), (1, 1), False)
    if not plain or pool.return_indices or window != stride or pixels.dim() != 4:
        return None
    _, height, width, _ = pixels.shape
    if window[0] > height or window[1] > width or not pools(pixels):
        return None
    return Windows(height, width, *window)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


class TaskLayerNorm(TaskLayer):
    """``nn.LayerNorm``."""

    def __init__(self, layer: nn.LayerNorm, names: dict[str, str], weights: TaskWeights) -> None:
        super().__init__(layer, names, weights)
        self.shape, self.eps = layer.normalized_shape, layer.eps

    def forward(self, inputs: Tensor) -> Tensor:
        normalised = F.layer_norm(inputs, self.shape, eps=self.eps)
        tasks = self.weights.tasks
        rows = normalised.reshape(tasks, -1, *self.shape)
        return self.affine(rows, lambda value: value[:, None]).view(inputs.shape)


class TaskChannelNorm(TaskLayer):
    """``nn.GroupNorm`` and ``nn.InstanceNorm``: a sample's own statistics, an affine a channel."""

    def __init__(self, layer: nn.Module, names: dict[str, str], weights: TaskWeights) -> None:
        super().__init__(layer, names, weights)
        self.groups: int | None = layer.num_groups if isinstance(layer, nn.GroupNorm) else None
        self.eps = float(layer.eps)  # type: ignore[arg-type]

    def forward(self, inputs: Tensor) -> Tensor:
        if self.groups is None:
            normalised = F.instance_norm(inputs, eps=self.eps)
        else:
            normalised = F.group_norm(inputs, self.groups, eps=self.eps)
        by_task = normalised.view(self.weights.tasks, -1, *inputs.shape[1:])
        space = (1,) * (inputs.dim() - 2)
        return self.affine(by_task, lambda v: v.view(len(v), 1, -1, *space)).flatten(0, 1)


class TaskEmbedding(TaskLayer):
    """``nn.Embedding``."""

    def forward(self, inputs: Tensor) -> Tensor:
        weight = self.value("weight")
        assert weight is not None
        tasks, rows = weight.shape[:2]
        inside = ((inputs >= 0) & (inputs < rows)).all()
        if inputs.device.type != "cpu":  # without waiting for the device
            torch._assert_async(inside)
        elif not inside:  # else it would be a row of another task
            raise IndexError(f"an index is not from 0 to {rows - 1}")
        first = torch.arange(0, tasks * rows, rows, device=inputs.device)
        indices = inputs.view(tasks, -1) + first[:, None]
        return F.embedding(indices, weight.reshape(tasks * rows, -1)).view(*inputs.shape, -1)


class FixedPart:
    """A forward of layers none of which adapts: between inner steps its features do not change.

    While ``weights.remember`` is set, its outputs for data (inputs that no parameter is behind) are
    kept for the next step, for the support set and for the query set.
    """

    kept_at_most = 2

    def __init__(self, part: nn.Module, statistics: Statistics) -> None:
        layers = [layer for layer in part.modules() if isinstance(layer, TaskLayer)]
        self.forward: Callable[..., Any] = part.forward
        self.weights = layers[0].weights
        self.names = [name for layer in layers for name in layer.names.values()]
        self.statistics = statistics
        self.kept: list[tuple[Any, list[Tensor], Tensor, int]] = []

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        given = self.statistics
        if not self.weights.remember or given.gather or named or len(inputs) != 1:
            return self.forward(*inputs, **named)
        if not isinstance(inputs[0], Tensor) or inputs[0].requires_grad:
            return self.forward(*inputs)
        return self._remembered(inputs[0])

    def _remembered(self, inputs: Tensor) -> Any:
        given, fast = self.statistics, self.weights.fast
        used = [inputs, *(fast[name] for name in self.names)]
        # Data is told by where it lies, which cannot pass to other data while it is kept.
        where = (inputs.data_ptr(), inputs.shape, inputs.stride(), inputs.dtype, inputs._version)
        key = (*where, given.groups, given.counted, given.running, torch.is_grad_enabled())
        for kept_key, kept_used, outputs, version in self.kept:
            same = zip(kept_used[1:], used[1:], strict=True)
            # A layer that follows may have written over them, such as a rectifier in place.
            sound = outputs._version == version
            if sound and kept_key == key and all(one is other for one, other in same):
                return outputs
        before = generator_state(inputs.device)
        outputs = self.forward(inputs)
        silent = torch.equal(before, generator_state(inputs.device))  # no noise such as dropout's
        if silent and isinstance(outputs, Tensor):
            kept = (key, used, outputs, outputs._version)
            self.kept = [*self.kept, kept][-self.kept_at_most :]
        return outputs

    def forget(self) -> None:
        """Let go of what was kept."""
        self.kept = []


def products(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Each task's rows ``(tasks, n, in)`` times its weight ``(tasks, out, in)``, plus its bias."""
    if bias is None:
        return torch.bmm(rows, weight.transpose(1, 2))
    return torch.baddbmm(bias[:, None], rows, weight.transpose(1, 2))
