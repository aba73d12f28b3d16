"""Layers over many tasks at once: every task's samples in one batch, each task with its weights.

A layer here receives the samples of ``T`` tasks side by side, ``(T * n, ...)``, as its original
would receive those of one, and takes its weights, ``(T, *shape)``, from the :class:`TaskWeights`
that all layers of a model share. Everything between the layers, a model's own ``forward``
included, acts on each sample alone and needs no change.

Small convolutions are matrix products over patches, in channels-last memory: ``torch`` has no
convolution with a weight a task that is fast to differentiate twice, and a patch row of
neighbouring channels is cheap to copy. Large ones call the native convolution for each task.
Nothing uses ``torch.func.vmap``, whose rules for normalisation layers have wrong second
derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from algorithms.normalisation import EpisodicBatchNorm, Statistics

NATIVE_FROM = 600_000
"""Elements in a task's patches from which a native convolution a task beats one batched product of
patches: by then patches leave the cache, and a task is work enough for a call of its own."""

BLOCK_ELEMENTS = 2**20
"""Elements of an intermediate result that is summed at once: larger ones leave the cache, and the
memory for the largest is fetched anew from the system at each use."""


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
        window = self.window
        places = window.places(0, inputs.shape[2]) * window.places(1, inputs.shape[3])
        samples = len(inputs) // self.weights.tasks
        natively = samples * places * weight[0, 0].numel() > NATIVE_FROM
        if natively and window.before == window.after:
            outputs = self._natively(inputs, weight)
        else:
            outputs = self._by_patches(inputs, weight)
        return self.weights.laid_out(outputs.squeeze(-2) if self.flat else outputs)

    def _by_patches(self, inputs: Tensor, weight: Tensor) -> Tensor:
        tasks = self.weights.tasks
        patches: Tensor = Patches.apply(inputs.permute(0, 2, 3, 1), self.window)  # type: ignore[no-untyped-call]
        samples, height, width = patches.shape[:3]
        outputs = products(
            patches.view(tasks, samples // tasks * height * width, -1),
            weight.permute(0, 1, 3, 4, 2).reshape(tasks, weight.shape[1], -1),
            self.value("bias"),
        )
        return outputs.view(samples, height, width, -1).permute(0, 3, 1, 2)

    def _natively(self, inputs: Tensor, weight: Tensor) -> Tensor:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        outputs: Tensor = Convolution.apply(inputs, weight, self.window)  # type: ignore[no-untyped-call]
        bias = self.value("bias")
        if bias is not None:
            by_task = outputs.view(self.weights.tasks, -1, *outputs.shape[1:])
            outputs = (by_task + bias[:, None, :, None, None]).flatten(0, 1)
        return outputs


class TaskBatchNorm(TaskLayer):
    """:class:`EpisodicBatchNorm`, whose averages and choice of statistics it shares."""

    def __init__(
        self, layer: EpisodicBatchNorm, names: dict[str, str], weights: TaskWeights
    ) -> None:
        super().__init__(layer, names, weights)
        self.eps = layer.eps
        self.statistics = layer.statistics
        self.averages = layer.averages

    def forward(self, inputs: Tensor) -> Tensor:
        given, tasks = self.statistics, self.weights.tasks
        rows = inputs.movedim(1, -1)
        space = rows.shape[1:-1].numel()
        grouped = rows.reshape(tasks * given.groups, -1, rows.shape[-1])
        if given.running:
            mean, var = self.averages.mean, self.averages.var
            assert mean is not None
            assert var is not None
            normalised = (grouped - mean) * torch.rsqrt(var + self.eps)
        elif given.counted is None:
            if given.gather:
                self._note(grouped.detach())
            normalised, _ = Standardise.apply(grouped, self.eps)  # type: ignore[no-untyped-call]
        else:
            counted = grouped[:, : given.counted * space]
            mean = counted.mean(1, keepdim=True)
            var = (counted - mean).square().mean(1, keepdim=True)
            normalised = (grouped - mean) * torch.rsqrt(var + self.eps)
        outputs = self.affine(normalised.view(tasks, -1, rows.shape[-1]), lambda v: v[:, None])
        return self.weights.laid_out(outputs.view(rows.shape).movedim(-1, 1))

    def _note(self, rows: Tensor) -> None:
        var, mean = torch.var_mean(rows, 1, correction=1)
        self.averages.noted.extend(zip(mean, var, strict=True))


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
        self.forward: Callable[[Tensor], Tensor] = part.forward
        self.weights = layers[0].weights
        self.names = [name for layer in layers for name in layer.names.values()]
        self.statistics = statistics
        self.kept: list[tuple[Any, list[Tensor], Tensor]] = []

    def __call__(self, inputs: Tensor) -> Tensor:
        given, fast = self.statistics, self.weights.fast
        if not self.weights.remember or given.gather or inputs.requires_grad:
            return self.forward(inputs)
        used = [inputs, *(fast[name] for name in self.names)]
        # Data is told by where it lies, which cannot pass to other data while it is kept.
        where = (inputs.data_ptr(), inputs.shape, inputs.stride(), inputs.dtype, inputs._version)
        key = (*where, given.groups, given.counted, given.running, torch.is_grad_enabled())
        for kept_key, kept_used, outputs in self.kept:
            same = zip(kept_used[1:], used[1:], strict=True)
            if kept_key == key and all(one is other for one, other in same):
                return outputs
        before = _generator_state(inputs.device)
        outputs = self.forward(inputs)
        if torch.equal(before, _generator_state(inputs.device)):  # no noise such as dropout's
            self.kept = [*self.kept, (key, used, outputs)][-self.kept_at_most :]
        return outputs

    def forget(self) -> None:
        """Let go of what was kept."""
        self.kept = []


def _generator_state(device: torch.device) -> Tensor:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()


def products(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Each task's rows ``(tasks, n, in)`` times its weight ``(tasks, out, in)``, plus its bias."""
    if bias is None:
        return torch.bmm(rows, weight.transpose(1, 2))
    return torch.baddbmm(bias[:, None], rows, weight.transpose(1, 2))


class Window(NamedTuple):
    """A convolution's window: height, then width."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    before: tuple[int, int]
    after: tuple[int, int]

    def places(self, dim: int, length: int) -> int:
        """How many places the window has along a dimension of this length."""
        padded = length + self.before[dim] + self.after[dim]
        return (padded - self.dilation[dim] * (self.kernel[dim] - 1) - 1) // self.stride[dim] + 1

    def taps(self, dim: int, length: int) -> list[tuple[slice, slice]]:
        """For each of the kernel's taps: the places at which it lies within a dimension of this
        length, and the pixels it then touches."""
        places, stride, taps = self.places(dim, length), self.stride[dim], []
        for tap in range(self.kernel[dim]):
            offset = tap * self.dilation[dim] - self.before[dim]
            first = max(0, -(offset // stride))
            last = max(first, min(places, -((offset - length) // stride)))
            start = first * stride + offset
            touched = slice(start, start + max(0, (last - first - 1) * stride + 1), stride)
            if first == last:
                touched = slice(0, 0)
            taps.append((slice(first, last), touched))
        return taps


class Patches(torch.autograd.Function):
    """The window's patches of images: ``(n, h, w, c)`` to ``(n, places, places, *kernel, c)``.

    Linear, and so the derivative of its derivative.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, window: Window) -> Tensor:
        ctx.window, ctx.size = window, images.shape[1:3]
        (top, left), (bottom, right) = window.before, window.after
        if top or left or bottom or right:
            images = F.pad(images, (0, 0, left, right, top, bottom))
        else:
            images = images.contiguous()
        n, height, width, channels = images.shape
        unpadded = window._replace(before=(0, 0), after=(0, 0))
        places = (unpadded.places(0, height), unpadded.places(1, width))
        sample, row, column, _ = images.stride()
        shape = (n, *places, *window.kernel, channels)
        strides = (
            sample,
            row * window.stride[0],
            column * window.stride[1],
            row * window.dilation[0],
            column * window.dilation[1],
            1,
        )
        return images.as_strided(shape, strides).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        images: Tensor = FromPatches.apply(gradient, ctx.window, ctx.size)  # type: ignore[no-untyped-call]
        return images, None


class FromPatches(torch.autograd.Function):
    """The transpose of :class:`Patches`: each pixel the sum of the patch elements it is in."""

    @staticmethod
    def forward(ctx: Any, patches: Tensor, window: Window, size: tuple[int, int]) -> Tensor:
        ctx.window = window
        images = patches.new_zeros(patches.shape[0], *size, patches.shape[-1])
        for i, (rows, pixel_rows) in enumerate(window.taps(0, size[0])):
            for j, (columns, pixel_columns) in enumerate(window.taps(1, size[1])):
                images[:, pixel_rows, pixel_columns] += patches[:, rows, columns, i, j]
        return images

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        patches: Tensor = Patches.apply(gradient, ctx.window)  # type: ignore[no-untyped-call]
        return patches, None, None


class Convolution(torch.autograd.Function):
    """Images ``(tasks * n, c, h, w)`` and each task's kernel ``(tasks, out, c, *kernel)``.

    One native convolution a task, or one in all where tasks share the kernel. The map is bilinear,
    and so are its two derivatives: the three are written in terms of each other, because ``torch``
    differentiates a convolution's derivative by convolutions whose kernels are whole images.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, kernels: Tensor, window: Window) -> Tensor:
        ctx.save_for_backward(images, kernels)
        ctx.window = window

        def convolve(x: Tensor, kernel: Tensor) -> Tensor:
            return F.conv2d(x, kernel, None, window.stride, window.before, window.dilation)

        return _by_kernel(convolve, kernels, images)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        images, kernels = ctx.saved_tensors
        to_images, to_kernels = None, None
        if ctx.needs_input_grad[0]:
            to_images = ConvolutionToImages.apply(gradient, kernels, ctx.window, images.shape)  # type: ignore[no-untyped-call]
        if ctx.needs_input_grad[1]:
            to_kernels = ConvolutionToKernels.apply(gradient, images, ctx.window, kernels.shape)  # type: ignore[no-untyped-call]
        return to_images, to_kernels, None


class ConvolutionToImages(torch.autograd.Function):
    """The derivative of :class:`Convolution` in the images, of an output's gradient."""

    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, kernels: Tensor, window: Window, size: torch.Size
    ) -> Tensor:
        ctx.save_for_backward(gradient, kernels)
        ctx.window = window

        def transposed(g: Tensor, kernel: Tensor) -> Tensor:
            # Only the shape and the memory format of the images are read.
            images = g.new_empty((len(g), *size[1:])).contiguous(memory_format=torch.channels_last)
            return _convolution_backward(g, images, kernel, window, (True, False, False))[0]

        return _by_kernel(transposed, kernels, gradient)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        gradient, kernels = ctx.saved_tensors
        to_gradient, to_kernels = None, None
        if ctx.needs_input_grad[0]:
            to_gradient = Convolution.apply(u, kernels, ctx.window)  # type: ignore[no-untyped-call]
        if ctx.needs_input_grad[1]:
            to_kernels = ConvolutionToKernels.apply(gradient, u, ctx.window, kernels.shape)  # type: ignore[no-untyped-call]
        return to_gradient, to_kernels, None, None


class ConvolutionToKernels(torch.autograd.Function):
    """The derivative of :class:`Convolution` in each task's kernel, of an output's gradient."""

    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, images: Tensor, window: Window, size: torch.Size
    ) -> Tensor:
        ctx.save_for_backward(gradient, images)
        ctx.window = window
        kernel = gradient.new_empty(size[1:]).contiguous(memory_format=torch.channels_last)
        kernels = [
            _convolution_backward(g, x, kernel, window, (False, True, False))[1]
            for g, x in zip(gradient.chunk(size[0]), images.chunk(size[0]), strict=True)
        ]
        return torch.stack(kernels)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        gradient, images = ctx.saved_tensors
        to_gradient, to_images = None, None
        if ctx.needs_input_grad[0]:
            to_gradient = Convolution.apply(images, u, ctx.window)  # type: ignore[no-untyped-call]
        if ctx.needs_input_grad[1]:
            to_images = ConvolutionToImages.apply(gradient, u, ctx.window, images.shape)  # type: ignore[no-untyped-call]
        return to_gradient, to_images, None, None


def _by_kernel(
    function: Callable[[Tensor, Tensor], Tensor], kernels: Tensor, samples: Tensor
) -> Tensor:
    """``function`` of each task's samples and its kernel; at once where the kernel is shared."""
    if len(kernels) == 1 or kernels.stride(0) == 0:
        return function(samples, kernels[0])
    parts = zip(samples.chunk(len(kernels)), kernels, strict=True)
    return torch.cat([function(part, kernel) for part, kernel in parts])


def _convolution_backward(
    gradient: Tensor, images: Tensor, kernel: Tensor, window: Window, wanted: tuple[bool, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        gradient,
        images,
        kernel,
        None,
        window.stride,
        window.before,
        window.dilation,
        False,
        (0, 0),
        1,
        wanted,
    )
    return found


class Standardise(torch.autograd.Function):
    """Rows ``(tasks, n, channels)`` less their mean over ``n``, over their standard deviation.

    Also returns 1 over the standard deviation, ``(tasks, 1, channels)``. With y the result, r that
    reciprocal, and means over n, the derivative is Ioffe and Szegedy's (2015, section 3):
    dx = r (dy - mean dy - y mean(y dy)) - r^2 y dr / n.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        mean = rows.mean(1, keepdim=True)
        var = _mean_over_rows(lambda part: (part - mean).square_(), rows)
        scale = torch.rsqrt(var + eps)
        standard = (rows - mean).mul_(scale)
        ctx.save_for_backward(standard, scale)
        ctx.set_materialize_grads(False)
        return standard, scale

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor | None, scale_gradient: Tensor | None
    ) -> tuple[Tensor | None, None]:
        standard, scale = ctx.saved_tensors
        rows: Tensor | None = None
        if gradient is not None:
            rows = StandardiseBackward.apply(gradient, standard, scale)  # type: ignore[no-untyped-call]
        if scale_gradient is not None:
            through_scale = scale * scale * scale_gradient / -standard.shape[1]
            if rows is None:
                rows = standard * through_scale
            else:
                rows = torch.addcmul(rows, standard, through_scale)
        return rows, None


class StandardiseBackward(torch.autograd.Function):
    """r (g - mean g - y mean(y g)): linear and symmetric in g, so its own transpose in g."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, standard: Tensor, scale: Tensor) -> Tensor:
        along = _mean_over_rows(torch.mul, gradient, standard)
        ctx.save_for_backward(gradient, standard, scale, along)
        rows = torch.addcmul(-scale * gradient.mean(1, keepdim=True), gradient, scale)
        return rows.addcmul_(standard, -scale * along)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gradient, standard, scale, along = ctx.saved_tensors
        to_gradient: Tensor = StandardiseBackward.apply(u, standard, scale)  # type: ignore[no-untyped-call]
        u_along = _mean_over_rows(torch.mul, u, standard)
        to_standard = (u * (-scale * along)).addcmul_(gradient, -scale * u_along)
        to_scale = (to_gradient * gradient).sum(1, keepdim=True) / scale
        return to_gradient, to_standard, to_scale


def _mean_over_rows(function: Callable[..., Tensor], *operands: Tensor) -> Tensor:
    """The mean over dimension 1 of an elementwise function, in blocks that stay in the cache."""
    tasks, rows, channels = operands[0].shape
    block = max(1, BLOCK_ELEMENTS // (tasks * channels))
    parts = zip(*(torch.split(operand, block, dim=1) for operand in operands), strict=True)
    return torch.stack([function(*part).sum(1, keepdim=True) for part in parts]).sum(0) / rows
