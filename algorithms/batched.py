"""The batched inner loop: all tasks of a meta-batch adapt at once.

The model's own ``forward`` runs on the samples of all tasks side by side, ``(T * n, ...)``, with
each layer that has parameters replaced by one that gives every task its own weights
(:mod:`algorithms.batched_layers`). The derivatives are those that ``higher`` takes, of the same
functions in the same order; only the tasks are not taken in turn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from algorithms.batched_layers import (
    FixedPart,
    TaskBatchNorm,
    TaskChannelNorm,
    TaskConv,
    TaskEmbedding,
    TaskLayer,
    TaskLayerNorm,
    TaskLinear,
    TaskSequential,
    TaskWeights,
)
from algorithms.inner_loop import (
    BETA2,
    EPSILON,
    NO_MOMENTS,
    Fast,
    InnerLoop,
    Moments,
    Rate,
    Tasks,
    UnsupportedError,
    alike,
    undisturbed,
)
from algorithms.normalisation import EpisodicBatchNorm, Statistics, hooked
from algorithms.precision import unrounded

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


PASS_ELEMENTS = {"cpu": 2**21, "cuda": 2**27}
"""Elements that the support set's widest activation may have in a pass: more tasks leave the
processor's cache, or fill the device's memory, and gain nothing. The query set's, which is not
differentiated twice, may have sixteen times as many."""
ONE_THREAD_ELEMENTS = 2**14
"""Elements of a pass's widest activation up to which one thread computes it as fast as several, on
a CPU: with work this small, to wait for another thread that has no core takes longer than all the
rest of it."""


class BatchedInnerLoop(InnerLoop):
    """All tasks at once.

    Args:
        model, adapted, settings: as for :class:`InnerLoop`.
        checkpoint_inner: keep of an inner step that is differentiated through only the weights it
            starts from, and compute it again in the backward pass: memory stops growing with the
            steps' activations, and time grows (Chen et al. 2016, arXiv 1604.06174).
        most_tasks: bound on the tasks of a pass; None takes as many as the device computes well.

    Raises:
        UnsupportedError: a layer of the model cannot be batched over tasks.
    """

    tasks_per_pass = 1

    def __init__(
        self,
        model: nn.Module,
        adapted: Sequence[str],
        *,
        checkpoint_inner: bool = False,
        most_tasks: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model, adapted, **settings)
        self.checkpoint_inner = checkpoint_inner
        self.most_tasks = most_tasks
        self._weights = TaskWeights()
        self.norm.model = _batched(self.norm.model, self.parameters, self._weights)
        self._fixed = _fixed_parts(self.norm.model, set(self.adapted), self.norm.statistics)
        self._widest = 0
        self._small = False

    def trajectory(
        self, tasks: Tasks, steps: int, *, create_graph: bool, first_order: bool = False
    ) -> Iterator[Fast]:
        theta = fast = self.initial(len(tasks), create_graph=create_graph)
        rule = _SGD(self.rate) if self.optimizer == "sgd" else _Adam(self.rate, self.moments())
        recompute = self.checkpoint_inner and create_graph
        self._weights.remember = not recompute  # what is not kept cannot be shared by steps
        stepped = partial(
            self._stepped, theta, tasks, create_graph=create_graph, first_order=first_order
        )
        try:
            yield fast
            for step in range(steps):
                if recompute:
                    fast, rule = checkpoint(
                        *(stepped, step, fast, rule),
                        use_reentrant=False,
                        context_fn=lambda: (nullcontext(), _Recomputing(self.norm.statistics)),
                    )
                else:
                    fast, rule = stepped(step, fast, rule)
                yield fast
            if isinstance(rule, _Adam) and rule.begun is not NO_MOMENTS:
                self.reached = rule.reached()
        finally:
            self._weights.remember = False
            for part in self._fixed:
                part.forget()

    def train(self, training: bool) -> None:
        self.norm.model.train(training)
        self.norm.start(training)

    def prepare(self, tasks: Tasks) -> None:
        """Besides, size the passes."""
        super().prepare(tasks)
        support, query = tasks.support_inputs.shape[1], tasks.query_inputs.shape[1]
        step = support if tasks.minibatches is None else tasks.minibatches.shape[2]
        if self.norm.layers and self.norm.mode == "single":
            query *= support + 1
        elements = PASS_ELEMENTS.get(tasks.support_inputs.device.type, PASS_ELEMENTS["cuda"])
        samples = max(step, -(-query // 16))
        self.tasks_per_pass = self.most_tasks or max(1, elements // (samples * self._widest))
        together = min(len(tasks), self.tasks_per_pass) * samples * self._widest
        on_cpu = tasks.support_inputs.device.type == "cpu"
        self._small = on_cpu and together <= ONE_THREAD_ELEMENTS

    def computing(self) -> AbstractContextManager[None]:
        return _one_thread() if self._small else nullcontext()

    def _vet(self, tasks: Tasks) -> None:
        """See, too, that the model's own code runs on several tasks at once and mixes none."""
        self._widest = self._vetted_width(tasks)

    def _vetted_width(self, tasks: Tasks) -> int:
        """Elements of a sample's widest activation, in a model that is seen to be supported.

        Two sets of samples go through it side by side, each at weights of its own, and give what
        they give the user's own model alone; and, as in training, the first beside another one and
        beside itself, with the same noise. Outputs that differ tell of code that mixes the samples
        of a batch, or the tasks that they are of, or looks at the types of modules.
        """
        sets = tasks.support_inputs[:2]
        if len(sets) < 2:
            size = min(tasks.support_inputs.shape[1], tasks.query_inputs.shape[1])
            sets = torch.cat([tasks.support_inputs[:, :size], tasks.query_inputs[:, :size]])
        widths: list[int] = []
        hooks = [
            layer.register_forward_hook(lambda _, __, out: widths.append(out[0].numel()))
            for layer in self.norm.model.modules()
            if isinstance(layer, TaskLayer)
        ]
        try:
            faithful = self._faithful(self.norm.model, sets)
            beside_itself = torch.cat([sets[:1], sets[:1]])
            training, by_itself = (self._in_training(each) for each in (sets, beside_itself))
        except Exception as error:  # whatever the model's own code raises
            if self._weights.channels_last:  # a view may need the order that its author had
                self._weights.channels_last = False
                return self._vetted_width(tasks)
            line = " ".join(str(error).split())
            raise UnsupportedError(
                f"the model's forward does not run on several tasks at once: {line}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        self._check_reach(self.norm.model, tasks)
        if not (faithful and alike(training[:1], by_itself[:1])):
            raise UnsupportedError(
                "the model's forward mixes the samples of a batch outside batch normalisation, or "
                "looks at the types of its modules"
            )
        return max(widths, default=1)

    @torch.no_grad()
    def _in_training(self, inputs: Tensor) -> Tensor:
        """Outputs at theta, with the noise of the moment."""
        with undisturbed(self.norm.model):
            self.norm.model.train(True)
            self.norm.start(False)
            return self.forward(self.initial(len(inputs), create_graph=False), inputs)

    def initial(self, tasks: int, *, create_graph: bool) -> Fast:
        fast: Fast = {}
        for name, value in self.parameters.items():
            shared = value if create_graph else value.detach()
            if value.dim() == 4:  # laid out once for all tasks as a convolution reads it
                shared = shared.contiguous(memory_format=torch.channels_last)
            fast[name] = shared.expand(tasks, *value.shape)
            if not create_graph:
                fast[name].requires_grad_(value.requires_grad)
        return fast

    def forward(
        self, fast: Fast, inputs: Tensor, *, groups: int = 1, counted: int | None = None
    ) -> Tensor:
        tasks = len(inputs)
        self.norm.count(inputs.shape[1], groups, counted)
        self._weights.fast, self._weights.tasks = fast, tasks
        try:
            outputs: Tensor = self.norm.model(inputs.flatten(0, 1))
        finally:
            self._weights.fast = {}
        return unrounded(outputs).view(tasks, inputs.shape[1], *outputs.shape[1:])

    def _stepped(
        self,
        theta: Fast,
        tasks: Tasks,
        step: int,
        fast: Fast,
        rule: _SGD,
        *,
        create_graph: bool,
        first_order: bool,
    ) -> tuple[Fast, _SGD]:
        """The fast weights, and the rule of the step to come, after one step."""
        loss = self.descended(fast, theta, tasks, step)
        names = [name for name in self.adapted if fast[name].requires_grad]
        gradients = torch.autograd.grad(
            loss,
            [fast[name] for name in names],
            create_graph=create_graph and not first_order,
            allow_unused=True,
        )
        found = zip(names, gradients, strict=True)
        stepped, rule = rule.step(
            fast, {name: self.shaped(name, g) for name, g in found if g is not None}
        )
        if not create_graph:
            stepped = {name: value.detach().requires_grad_() for name, value in stepped.items()}
        return fast | stepped, rule


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread, and put the number back as it was. It is one for the whole process:
    threads of the user's own, beside which another may be at this, leave it as it is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Recomputing:
    """While a step is computed again, nothing is gathered for running averages; may be entered
    again."""

    def __init__(self, statistics: Statistics) -> None:
        self.statistics = statistics

    def __enter__(self) -> None:
        self.gather = self.statistics.gather
        self.statistics.gather = False

    def __exit__(self, *raised: object) -> None:
        self.statistics.gather = self.gather


class _SGD:
    """Gradient descent. A rule is never changed, so that a step can be computed again.

    Args:
        rate: step size of each parameter in each step.
        steps: how many steps there were.
    """

    def __init__(self, rate: Rate, steps: int = 0) -> None:
        self.rate = rate
        self.steps = steps

    def step(self, fast: Fast, gradients: Fast) -> tuple[Fast, _SGD]:
        """The weights that have a gradient after this step, and the rule of the next."""
        stepped = {n: _less(fast[n], self.rate(n, self.steps), g) for n, g in gradients.items()}
        return stepped, _SGD(self.rate, self.steps + 1)


class _Adam(_SGD):
    """Adam with beta1 = 0, so that the first moment is the gradient itself.

    Args:
        begun: the moments before the first step.
        squares: those of now; None for those of the beginning.
    """

    def __init__(
        self, rate: Rate, begun: Moments, steps: int = 0, squares: Fast | None = None
    ) -> None:
        super().__init__(rate, steps)
        self.begun = begun
        self.squares = begun.squares if squares is None else squares

    def step(self, fast: Fast, gradients: Fast) -> tuple[Fast, _SGD]:
        stepped, squares = {}, dict(self.squares)
        unbias = self.begun.after(self.steps + 1) ** 0.5
        for name, gradient in gradients.items():
            square = (1 - BETA2) * gradient * gradient
            if name in squares:
                square = BETA2 * squares[name] + square
            squares[name] = square
            size = self.rate(name, self.steps) * unbias
            stepped[name] = _less(fast[name], size, gradient / (_root(square) + EPSILON))
        return stepped, _Adam(self.rate, self.begun, self.steps + 1, squares)

    def reached(self) -> Moments:
        """The moments of now, without a graph."""
        squares = {name: square.detach() for name, square in self.squares.items()}
        return Moments(squares, self.begun.after(self.steps))


def _root(moment: Tensor) -> Tensor:
    """The square root. At a moment of zero it has no derivative, and the gradient is zero and stays
    so: such elements are constants, as ``higher`` has them."""
    if not moment.requires_grad:
        return moment.sqrt()
    zero = moment == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, moment).sqrt())


def _less(weights: Tensor, size: float | Tensor, direction: Tensor) -> Tensor:
    """``weights - size * direction``; where the size is a number, in one pass."""
    if isinstance(size, Tensor):
        return weights - size * direction
    return torch.sub(weights, direction, alpha=size)


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
            raise UnsupportedError(
                f"{type(module).__name__}{where} cannot be batched over tasks: it has parameters "
                f"and is none of {', '.join(_public(layer) for layer in LAYERS)}"
            )
        else:
            for name, child in module._modules.items():  # named_children skips repeated ones
                if child is not None:
                    module._modules[name] = replace(child, f"{path}.{name}" if path else name)
            if type(module) is nn.Sequential and not hooked(module):
                made = TaskSequential()
                made._modules = module._modules  # as they are, also where one is there twice
        replaced[id(module)] = made
        return made

    return replace(model, "")


def _fixed_parts(module: nn.Module, adapted: set[str], statistics: Statistics) -> list[FixedPart]:
    """The largest parts of a model that do not adapt, their forwards replaced."""
    parts = []
    for child in module.children():
        layers = [each for each in child.modules() if isinstance(each, TaskLayer)]
        if layers and all(adapted.isdisjoint(layer.names.values()) for layer in layers):
            part = FixedPart(child, statistics)
            child.forward = part
            parts.append(part)
        else:
            parts += _fixed_parts(child, adapted, statistics)
    return parts


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
    if hooked(layer) or list(layer.children()):
        odd.append("hooks or parametrizations")
    if odd:
        raise UnsupportedError(
            f"{_public(type(layer))} ({path}) with {', '.join(odd)} cannot be batched over tasks"
        )


def _public(layer: type[nn.Module]) -> str:
    return "BatchNorm" if layer is EpisodicBatchNorm else layer.__name__
