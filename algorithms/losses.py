"""What a task is scored by: the targets decide."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def task_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean loss of each task: cross-entropy for integer targets, squared error for floating ones.

    Args:
        outputs: ``(tasks, n, classes)``, or ``(tasks, n, out)`` for regression.
        targets: int64 ``(tasks, n)``, or floating ``(tasks, n, out)``.

    Returns:
        ``(tasks,)``.

    Raises:
        ValueError: floating targets of another shape than the outputs, against which they would be
            repeated.
    """
    if targets.is_floating_point():
        if outputs.shape != targets.shape:
            shapes = f"{tuple(outputs.shape[1:])} and targets of {tuple(targets.shape[1:])}"
            raise ValueError(f"a task's outputs of {shapes} do not fit one another")
        return F.mse_loss(outputs, targets, reduction="none").flatten(1).mean(1)
    losses = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(1)


def task_metrics(outputs: Tensor, targets: Tensor, losses: Tensor) -> Tensor:
    """What results quote for each task ``(tasks,)``: accuracy in [0, 1], or the mean squared error,
    which is its loss."""
    if targets.is_floating_point():
        return losses
    return (outputs.argmax(-1) == targets).to(outputs.dtype).mean(1)
