"""The batched inner loop: all tasks of a meta-batch adapt at once.

The model's own ``forward`` runs on the samples of all tasks side by side, ``(T * n, ...)``, with
each layer that has parameters replaced by one that gives every task its own weights
(:mod:`algorithms.batched_layers`). The derivatives are those that ``higher`` takes, of the same
functions in the same order; only the tasks are not taken in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.batched_layers import (
    TaskBatchNorm,
    TaskChannelNorm,
    TaskConv,
    TaskEmbedding,
    TaskLayer,
    TaskLayerNorm,
    TaskLinear,
    TaskWeights,
)
from algorithms.inner_loop import Fast, InnerLoop, Tasks
from algorithms.losses import task_losses
from algorithms.normalisation import EpisodicBatchNorm

LAYERS: dict[type[nn.Module], Callable[[Any, dict[str, str], TaskWeights], TaskLayer]] = {
    nn.Linear: TaskLinear,
    nn.Conv1d: TaskConv,
    nn.Conv2d: TaskConv,
    EpisodicBatchNorm: TaskBatchNorm,
    nn.LayerNorm: TaskLayerNorm,
    nn.GroupNorm: TaskChannelNorm,
    nn.InstanceNorm1d: TaskChannelNorm,
    nn.InstanceNorm2d: TaskChannelNorm,
    nn.InstanceNorm3d: TaskChannelNorm,
    nn.Embedding: TaskEmbedding,
}


class Unsupported(ValueError):
    """The model has something that cannot be batched over tasks; the message is one line."""


class BatchedInnerLoop(InnerLoop):
    """All tasks at once. Takes :class:`InnerLoop`'s arguments.

    Raises:
        Unsupported: a layer of the model cannot be batched over tasks.
    """

    tasks_per_pass = 2**30

    def __init__(self, model: nn.Module, adapted: Sequence[str], **settings: Any) -> None:
        super().__init__(model, adapted, **settings)
        self._weights = TaskWeights()
        self.norm.model = _batched(self.norm.model, self.parameters, self._weights)
        self._vetted = False

    def trajectory(self, tasks: Tasks, steps: int, *, create_graph: bool) -> Iterator[Fast]:
        fast = {name: self._start(value, create_graph) for name, value in self.parameters.items()}
        fast = {name: value.expand(len(tasks), *value.shape[1:]) for name, value in fast.items()}
        if not create_graph:
            for name, value in self.parameters.items():
                fast[name].requires_grad_(value.requires_grad)
        rule = _Adam(self.lr) if self.optimizer == "adam" else _SGD(self.lr)
        yield fast
        for step in range(steps):
            inputs, targets = tasks.support_inputs, tasks.support_targets
            if tasks.minibatches is not None:
                each = torch.arange(len(tasks), device=inputs.device)[:, None]
                chosen = tasks.minibatches[:, step]
                inputs, targets = inputs[each, chosen], targets[each, chosen]
            losses = task_losses(self._forward(fast, inputs), targets)
            fast = fast | self._stepped(fast, losses.sum(), rule, create_graph)
            yield fast

    def query(self, fast: Fast, tasks: Tasks) -> Tensor:
        support, query = tasks.support_inputs, tasks.query_inputs
        shots, queries = support.shape[1], query.shape[1]
        if self.norm.mode in ("transductive", "running") or not self.norm.layers:
            return self._forward(fast, query)
        if self.norm.mode == "support":
            both = torch.cat([support, query], dim=1)
            return self._forward(fast, both, counted=shots)[:, shots:]
        beside = support[:, None].expand(-1, queries, *support.shape[1:])
        groups = torch.cat([beside, query[:, :, None]], dim=2)
        outputs = self._forward(fast, groups.flatten(1, 2), groups=queries)
        return outputs.unflatten(1, (queries, shots + 1))[:, :, -1]

    def train(self, training: bool) -> None:
        self.norm.model.train(training)
        self.norm.start(training)

    def objection(self, tasks: Tasks) -> str | None:
        """Why the model's own code cannot run on several tasks at once; None where it can.

        The first two tasks' support sets go through the initial model together, and the first
        alone: the outputs differ where code mixes the samples of a batch. Once that has been seen
        to work, it is taken for granted.
        """
        if self._vetted or len(tasks) < 2:
            return None
        training = self.norm.model.training
        two = tasks.support_inputs[:2]
        start = {name: value.detach()[None] for name, value in self.parameters.items()}
        gather, self.norm.statistics.gather = self.norm.statistics.gather, False
        self.norm.model.eval()
        try:
            with torch.no_grad():
                alone = self._forward(start, two[:1])
                pair = {name: value.expand(2, *value.shape[1:]) for name, value in start.items()}
                together = self._forward(pair, two)[:1]
        except Exception as error:  # whatever the model's own code raises
            line = " ".join(str(error).split())
            return f"the model's forward does not run on several tasks at once: {line}"
        finally:
            self.norm.model.train(training)
            self.norm.statistics.gather = gather
        tolerance = torch.finfo(alone.dtype).eps ** 0.5
        if together.shape != alone.shape or not torch.allclose(
            together, alone, rtol=tolerance, atol=tolerance * float(alone.abs().max())
        ):
            return "the model's forward mixes the samples of a batch outside batch normalisation"
        self._vetted = True
        return None

    def _start(self, value: Tensor, create_graph: bool) -> Tensor:
        if not create_graph:
            value = value.detach()
        if value.dim() == 4:  # where a convolution reads it without copying it a task
            value = value.contiguous(memory_format=torch.channels_last)
        return value[None]

    def _forward(
        self, fast: Fast, inputs: Tensor, *, groups: int = 1, counted: int | None = None
    ) -> Tensor:
        tasks = len(inputs)
        statistics = self.norm.statistics
        statistics.groups, statistics.counted = groups, counted
        self._weights.fast, self._weights.tasks = fast, tasks
        try:
            outputs: Tensor = self.norm.model(inputs.flatten(0, 1))
        finally:
            self._weights.fast = {}
        return outputs.unflatten(0, (tasks, -1))

    def _stepped(self, fast: Fast, loss: Tensor, rule: _SGD, create_graph: bool) -> Fast:
        names = [name for name in self.adapted if fast[name].requires_grad]
        gradients = torch.autograd.grad(
            loss, [fast[name] for name in names], create_graph=create_graph, allow_unused=True
        )
        stepped: Fast = {}
        rule.begin()
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                if self.clip is not None:
                    gradient = gradient.clamp(-self.clip, self.clip)
                stepped[name] = fast[name] - rule.change(name, gradient)
                if not create_graph:
                    stepped[name] = stepped[name].detach().requires_grad_()
        return stepped


class _SGD:
    """Gradient descent."""

    def __init__(self, lr: float) -> None:
        self.lr = lr

    def begin(self) -> None:
        """A step begins."""

    def change(self, name: str, gradient: Tensor) -> Tensor:
        """What a parameter loses in this step."""
        return self.lr * gradient


class _Adam(_SGD):
    """Adam with beta1 = 0, so that the first moment is the gradient itself."""

    beta2, eps = 0.999, 1e-8

    def __init__(self, lr: float) -> None:
        super().__init__(lr)
        self.steps = 0
        self.moments: dict[str, Tensor] = {}

    def begin(self) -> None:
        self.steps += 1

    def change(self, name: str, gradient: Tensor) -> Tensor:
        moment = (1 - self.beta2) * gradient * gradient
        if name in self.moments:
            moment = self.beta2 * self.moments[name] + moment
        self.moments[name] = moment
        # At a moment of zero the root has no derivative, and the gradient is zero and stays so:
        # such elements are constants, as ``higher`` has them.
        zero = moment == 0
        root = torch.where(zero, 0.0, torch.where(zero, 1.0, moment).sqrt())
        size = self.lr * (1 - self.beta2**self.steps) ** 0.5
        return size * gradient / (root + self.eps)


def _batched(model: nn.Module, parameters: dict[str, Tensor], weights: TaskWeights) -> nn.Module:
    """``model``, a private copy of a structure, with its layers replaced by task-batched ones."""
    names = {id(value): name for name, value in parameters.items()}
    replaced: dict[int, nn.Module] = {}

    def replace(module: nn.Module, path: str) -> nn.Module:
        if id(module) in replaced:
            return replaced[id(module)]
        own = {
            attribute: names[id(value)]
            for attribute, value in module.named_parameters(recurse=False)
        }
        made = module
        batched = LAYERS.get(type(module))
        if batched is not None:
            _check_settings(module, path)
            made = batched(module, own, weights)
        elif own:
            where = f" ({path})" if path else ""
            raise Unsupported(
                f"{type(module).__name__}{where} cannot be batched over tasks: it has parameters "
                f"and is none of {', '.join(_public(layer) for layer in LAYERS)}"
            )
        else:
            for name, child in list(module.named_children()):
                setattr(module, name, replace(child, f"{path}.{name}" if path else name))
        replaced[id(module)] = made
        return made

    return replace(model, "")


def _check_settings(layer: nn.Module, path: str) -> None:
    odd = []
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        if layer.groups != 1:
            odd.append(f"groups={layer.groups}")
        if layer.padding_mode != "zeros":
            odd.append(f"padding_mode={layer.padding_mode!r}")
    if isinstance(layer, nn.Embedding):
        for name in ("padding_idx", "max_norm"):
            if getattr(layer, name) is not None:
                odd.append(f"{name}={getattr(layer, name)}")
        if layer.scale_grad_by_freq or layer.sparse:
            odd.append("scaled or sparse gradients")
    if getattr(layer, "track_running_stats", False):
        odd.append("track_running_stats=True")
    if layer._forward_hooks or layer._forward_pre_hooks or list(layer.children()):
        odd.append("hooks or parametrizations")
    if odd:
        raise Unsupported(
            f"{_public(type(layer))} ({path}) with {', '.join(odd)} cannot be batched over tasks"
        )


def _public(layer: type[nn.Module]) -> str:
    return "BatchNorm" if layer is EpisodicBatchNorm else layer.__name__
