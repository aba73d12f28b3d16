"""Convolutions of many tasks at once, every task with a kernel of its own, differentiable twice.

``torch`` has none that is fast to differentiate twice. On a CPU the compiled kernels of
:mod:`algorithms.kernels` do it; elsewhere small ones are batched matrix products over patches, and
large ones call the native convolution for each task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from algorithms.kernels import Geometry, kernels_for
from algorithms.precision import factor

NATIVE_FROM = 600_000
"""Elements in a task's patches from which a native convolution a task beats one batched product of
patches: by then patches leave the cache, and a task is work enough for a call of its own."""


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


def convolution(images: Tensor, kernels: Tensor, window: Window) -> Tensor:
    """Each task's images convolved with its kernels.

    Args:
        images: ``(tasks * n, channels, height, width)``, the tasks side by side.
        kernels: ``(tasks, filters, channels, *window.kernel)``.
        window: where the kernels go.

    Returns:
        ``(tasks * n, filters, rows, columns)``, in channels-last memory.

    Raises:
        ValueError: shapes or types that do not fit one another.
    """
    images, kernels = factor(images), factor(kernels)
    _check(images, kernels, window)
    if kernels_for(images) is not None or _natively(images, kernels, window):
        outputs: Tensor = Convolution.apply(images, kernels, window)  # type: ignore[no-untyped-call]
        return outputs
    patches: Tensor = Patches.apply(images.permute(0, 2, 3, 1), window)  # type: ignore[no-untyped-call]
    samples, rows, columns = patches.shape[:3]
    tasks, filters = kernels.shape[:2]
    products = torch.bmm(
        patches.view(tasks, samples // tasks * rows * columns, -1),
        kernels.permute(0, 1, 3, 4, 2).reshape(tasks, filters, -1).transpose(1, 2),
    )
    return products.view(samples, rows, columns, filters).permute(0, 3, 1, 2)


def _check(images: Tensor, kernels: Tensor, window: Window) -> None:
    """What a compiled kernel takes on trust."""
    samples, channels, height, width = images.shape
    tasks = len(kernels)
    if samples % tasks or (channels, *window.kernel) != kernels.shape[2:]:
        shapes = f"{tuple(images.shape)} and kernels of {tuple(kernels.shape)}"
        raise ValueError(f"images of {shapes} do not fit one another")
    if (images.dtype, images.device) != (kernels.dtype, kernels.device):
        raise ValueError(f"images are {images.dtype}, kernels are {kernels.dtype}")
    if min(window.places(0, height), window.places(1, width)) < 1:
        raise ValueError(f"a kernel of {window.kernel} is larger than images of {height} x {width}")


def _natively(images: Tensor, kernels: Tensor, window: Window) -> bool:
    samples, _, height, width = images.shape
    places = window.places(0, height) * window.places(1, width)
    large = samples // len(kernels) * places * kernels[0, 0].numel() > NATIVE_FROM
    return large and window.before == window.after


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
    """Images ``(tasks * n, c, h, w)`` and each task's kernels ``(tasks, out, c, *kernel)``.

    The map is bilinear, and so are its two derivatives: the three are written in terms of each
    other, because ``torch`` differentiates a convolution's derivative by convolutions whose kernels
    are whole images.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, kernels: Tensor, window: Window) -> Tensor:
        ctx.save_for_backward(images, kernels)
        ctx.window = window
        if kernels_for(images) is not None:
            return _compiled("convolution", window, images=images, kernels=kernels)
        images = images.contiguous(memory_format=torch.channels_last)

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
        if kernels_for(gradient) is not None:
            return _compiled(
                "convolution_to_images", window, kernels=kernels, outputs=gradient, made=size
            )

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
    """The derivative of :class:`Convolution` in each task's kernels, of an output's gradient."""

    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, images: Tensor, window: Window, size: torch.Size
    ) -> Tensor:
        ctx.save_for_backward(gradient, images)
        ctx.window = window
        if kernels_for(gradient) is not None:
            return _compiled(
                "convolution_to_kernels", window, images=images, outputs=gradient, made=size
            )
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


def _compiled(
    name: str,
    window: Window,
    *,
    images: Tensor | None = None,
    kernels: Tensor | None = None,
    outputs: Tensor | None = None,
    made: torch.Size | None = None,
) -> Tensor:
    """What a compiled kernel makes of two of the three; ``made`` is the shape of the third, which
    the outputs' need not be told."""
    given = next(each for each in (images, outputs) if each is not None)
    compiled = kernels_for(given)
    assert compiled is not None
    shared = kernels is not None and _one_for_all(kernels)
    image_shape = made if images is None else images.shape
    kernel_shape = made if kernels is None else kernels.shape
    assert image_shape is not None
    assert kernel_shape is not None
    (samples, channels, height, width), (tasks, filters) = image_shape, kernel_shape[:2]
    rows, columns = window.places(0, height), window.places(1, width)
    geometry = Geometry(
        *(0, tasks, samples // tasks, height, width, channels, rows, columns, filters),
        *(*window.kernel, *window.stride, *window.dilation, *window.before, shared),
    )

    def empty(*shape: int) -> Tensor:
        # Not a view of what is laid out otherwise: layers that follow may write to it in place.
        order = [*range(len(shape) - 3), len(shape) - 2, len(shape) - 1, len(shape) - 3]
        made: Tensor = torch.empty_permuted(shape, order, dtype=given.dtype, device=given.device)
        return made

    if shared:
        assert kernels is not None
        kernels = kernels[:1]
    if images is None:
        images = found = empty(samples, channels, height, width)
    elif kernels is None:
        kernels = found = empty(tasks, filters, channels, *window.kernel)
    else:
        outputs = found = empty(samples, filters, rows, columns)
    if not samples:
        return found.zero_()
    compiled.convolve(name, geometry, *map(_laid_out, (images, kernels, outputs)))
    return found


def _laid_out(tensor: Tensor | None) -> Tensor:
    """Channels last, as the kernels read and write."""
    assert tensor is not None
    return tensor.movedim(-3, -1).contiguous()


def _one_for_all(kernels: Tensor) -> bool:
    """Whether all tasks have the same kernels, of which there is one in memory."""
    return len(kernels) == 1 or kernels.stride(0) == 0


def _by_kernel(
    function: Callable[[Tensor, Tensor], Tensor], kernels: Tensor, samples: Tensor
) -> Tensor:
    """``function`` of each task's samples and its kernel; at once where the kernel is shared."""
    if _one_for_all(kernels):
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
