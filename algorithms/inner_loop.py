"""The inner loop: adapt parameters to the support sets of tasks by differentiable gradient steps.

The one primitive that every gradient-based algorithm here is written over. Fast weights carry a
leading dimension that counts tasks, so that an implementation may adapt one task at a time, as
this one built on ``higher`` does, or many at once, and the algorithms read the same.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import higher
import torch
from torch import Tensor, nn

from algorithms.losses import task_losses
from algorithms.normalisation import EpisodicNorm, hooked
from algorithms.precision import unrounded

Fast = dict[str, Tensor]
"""Every parameter by its name in the model, ``(tasks, *shape)``: theta' of each task."""

Rate = Callable[[str, int], float | Tensor]
"""The step size of a parameter, by its name, in an inner step (from 0): a number, or a tensor that
broadcasts over the parameter and that gradients flow into."""

Direction = Callable[[str, Tensor], Tensor]
"""What a step takes for the gradient ``(tasks, *shape)`` of a parameter, by its name; gradients
flow through it."""

OPTIMIZERS = ("sgd", "adam")
BETA2, EPSILON = 0.999, 1e-8
"""Of the inner Adam, whose beta1 is 0."""


@dataclass(frozen=True)
class Moments:
    """What an inner Adam knows of gradients: averages of their squares over steps.

    Attributes:
        squares: of each parameter that adapts, ``(tasks, *shape)``, or ``(1, *shape)`` for all.
        mass: the sum of the averages' weights, by which they are too small: 1 - beta2^t after t
            steps.
    """

    squares: Fast
    mass: float

    def after(self, steps: int) -> float:
        """The mass after so many further steps."""
        return 1 - (1 - self.mass) * BETA2**steps


NO_MOMENTS = Moments({}, 0.0)
"""What Adam starts with, unless an algorithm keeps its moments."""


class UnsupportedError(ValueError):
    """An engine cannot run a model; the message is one line and says why."""


class ModelError(ValueError):
    """No engine computes with a model what it says; the message is one line and says why."""


def generator_state(device: torch.device) -> Tensor:
    """That of torch's generator for a device."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()


def alike(found: Tensor, expected: Tensor) -> bool:
    """Whether outputs of two ways to compute the same differ by no more than rounding."""
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    bound = tolerance * float(expected.abs().max())
    return torch.allclose(found, expected, rtol=tolerance, atol=bound, equal_nan=True)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Forward passes within leave no trace in a model's modes and buffers, nor in generators."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {value.device for value in model.parameters() if value.device.type == "cuda"}
    with torch.random.fork_rng(devices=[device.index for device in devices]):
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for module, name, buffer, before in buffers:
                    module._buffers[name] = buffer.copy_(before)


@dataclass(frozen=True)
class Tasks:
    """Tasks to adapt to.

    Attributes:
        support_inputs: ``(tasks, n, *sample_shape)``.
        support_targets: ``(tasks, n)`` or ``(tasks, n, out)``.
        query_inputs: ``(tasks, m, *sample_shape)``.
        query_targets: ``(tasks, m)`` or ``(tasks, m, out)``.
        minibatches: int64 ``(tasks, steps, size)``, the support samples that each inner step uses;
            None uses all of them in every step.
    """

    support_inputs: Tensor
    support_targets: Tensor
    query_inputs: Tensor
    query_targets: Tensor
    minibatches: Tensor | None = None

    @classmethod
    def of(cls, batch: Mapping[str, Sequence[Tensor]], like: Tensor) -> Tasks:
        """A torchmeta batch's tasks, on the device and in the dtype of ``like``; inputs that are
        indices stay such."""

        def half(name: str) -> tuple[Tensor, Tensor]:
            inputs, targets = batch[name]
            indices = inputs.dtype in (torch.int32, torch.int64)  # as an embedding takes them
            dtype = like.dtype if targets.is_floating_point() else torch.int64
            return (
                inputs.to(like.device, inputs.dtype if indices else like.dtype),
                targets.to(like.device, dtype),
            )

        return cls(*half("train"), *half("test"))

    def __len__(self) -> int:
        return len(self.support_inputs)

    def support_at(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets ``(tasks, n, ...)`` of the support samples that a step uses."""
        if self.minibatches is None:
            return self.support_inputs, self.support_targets
        chosen = self.minibatches[:, step]
        each = torch.arange(len(self), device=chosen.device)[:, None]
        return self.support_inputs[each, chosen], self.support_targets[each, chosen]

    def split(self, size: int) -> Iterator[Tasks]:
        """These tasks, ``size`` at a time."""
        if size >= len(self):
            yield self
            return
        for first in range(0, len(self), size):
            part = slice(first, first + size)
            yield Tasks(
                self.support_inputs[part],
                self.support_targets[part],
                self.query_inputs[part],
                self.query_targets[part],
                None if self.minibatches is None else self.minibatches[part],
            )


def leaves(outputs: Tensor) -> Iterator[Tensor]:
    """The tensors that the gradient of a result reaches and that were not computed."""
    waiting, seen = [outputs.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [before for before, _ in node.next_functions]


class InnerLoop(ABC):
    """Adapts tasks, and scores what came of it.

    Args:
        model: the network whose parameters adapt; its structure is left as it is.
        adapted: names of the parameters that the inner loop changes.
        rate: step size alpha of each parameter in each step.
        direction: what is done to a gradient, once it is clipped, before it is descended.
        optimizer: ``"sgd"``, or ``"adam"`` with beta1 = 0 as in Nichol et al. 2018 (Reptile).
        moments: what Adam starts with in every task.
        clip: bound on each element of the inner gradient, or None.
        proximal: lambda; the steps descend the support loss plus lambda / 2 times the squared
            distance of the adapted parameters from where they began.
        norm: a mode of :mod:`algorithms.normalisation`.
    """

    tasks_per_pass: int
    """How many tasks one call of :meth:`trajectory` is given."""
    reached: Moments = NO_MOMENTS
    """Adam's moments at the end of the last trajectory, without a graph, where it began with those
    of an algorithm that keeps them."""

    def __init__(
        self,
        model: nn.Module,
        adapted: Sequence[str],
        *,
        rate: Rate,
        direction: Direction = lambda name, gradient: gradient,
        optimizer: str = "sgd",
        moments: Callable[[], Moments] = lambda: NO_MOMENTS,
        clip: float | None = None,
        proximal: float = 0.0,
        norm: str = "transductive",
    ) -> None:
        self.adapted = list(adapted)
        self.rate = rate
        self.direction = direction
        self.optimizer = optimizer
        self.moments = moments
        self.clip = clip
        self.proximal = proximal
        self.own = model
        self.norm = EpisodicNorm(model, norm)
        self.parameters: dict[str, Tensor] = dict(self.norm.model.named_parameters())
        self._vetted = False

    @abstractmethod
    def initial(self, tasks: int, *, create_graph: bool) -> Fast:
        """theta for so many tasks: the parameters themselves, or leaves without ``create_graph``.
        Those that do not need a gradient in the model need none here."""

    @abstractmethod
    def trajectory(
        self, tasks: Tasks, steps: int, *, create_graph: bool, first_order: bool = False
    ) -> Iterator[Fast]:
        """The fast weights after 0, 1, ... ``steps`` gradient steps on the support sets.

        Args:
            tasks: at most :attr:`tasks_per_pass` of them.
            steps: how many steps, at least 0.
            create_graph: keep the graph, so that a gradient reaches the model's parameters through
                the steps (second order). Without it the fast weights of each step are leaves.
            first_order: in that graph, take the inner gradients to be constants; what reaches the
                parameters and the rates is then of first order.
        """

    @abstractmethod
    def forward(
        self, fast: Fast, inputs: Tensor, *, groups: int = 1, counted: int | None = None
    ) -> Tensor:
        """The model at these fast weights; see :class:`algorithms.normalisation.Forward`."""

    def descended(self, fast: Fast, theta: Fast, tasks: Tasks, step: int) -> Tensor:
        """What an inner step descends, summed over the tasks: a scalar.

        Args:
            fast: the weights before the step.
            theta: those that the tasks began with.
            tasks: the tasks.
            step: which of them, from 0.
        """
        inputs, targets = tasks.support_at(step)
        loss = task_losses(self.forward(fast, inputs), targets).sum()
        if self.proximal:
            away = [(fast[name] - theta[name]).square().sum() for name in self.adapted]
            loss = loss + self.proximal / 2 * torch.stack(away).sum()
        return loss

    def shaped(self, name: str, gradient: Tensor) -> Tensor:
        """An inner gradient ``(tasks, *shape)`` as a step takes it: clipped and directed."""
        if self.clip is not None:
            gradient = gradient.clamp(-self.clip, self.clip)
        return self.direction(name, gradient)

    def query(self, fast: Fast, tasks: Tasks) -> Tensor:
        """Outputs for the query sets ``(tasks, m, out)`` at these fast weights."""
        return self.norm.query(
            partial(self.forward, fast), tasks.support_inputs, tasks.query_inputs
        )

    @abstractmethod
    def train(self, training: bool) -> None:
        """Begin a meta-step (True) or an evaluation (False)."""

    def prepare(self, tasks: Tasks) -> None:
        """Make ready for such tasks.

        Raises:
            UnsupportedError: this engine cannot run the model on them.
            ModelError: no engine can.
        """
        if not self._vetted:
            self._vet(tasks)
            self._vetted = True

    @abstractmethod
    def _vet(self, tasks: Tasks) -> None:
        """See once that the engine computes what the model's own code says."""

    def _check_reach(self, model: nn.Module, tasks: Tasks) -> None:
        """See that the model, as this engine runs it, computes with the weights that it is given,
        and with no others: neither with its own nor with such as none of its modules has."""
        with undisturbed(model), torch.enable_grad():
            self.train(False)
            outputs = self.forward(self.initial(1, create_graph=False), tasks.support_inputs[:1])
        # What is given is no parameter.
        past = {id(leaf): leaf for leaf in leaves(outputs) if isinstance(leaf, nn.Parameter)}
        if past:
            names = [name for name, value in self.parameters.items() if id(value) in past]
            shapes = [f"a parameter {tuple(leaf.shape)} of none of them" for leaf in past.values()]
            raise ModelError(
                f"the model's forward reaches {[*names, *shapes][0]} past its modules, as by a "
                "Python list or a closure, where it cannot adapt; put them in nn.ModuleList, or "
                "use attributes"
            )

    @torch.no_grad()
    def _faithful(self, model: nn.Module, sets: Tensor) -> bool:
        """Whether each of some tasks, with samples ``(tasks, n, ...)`` and weights that no other
        task has, gets the outputs that the user's own model gives it at these weights."""
        generator = torch.Generator().manual_seed(0)

        def scattered(value: Tensor) -> Tensor:
            size = 0.1 * float(value.square().mean().sqrt()) or 0.1
            noise = torch.randn(len(sets), *value.shape, generator=generator)
            return value + size * noise.to(value)

        fast = {name: scattered(value) for name, value in self.parameters.items()}
        with undisturbed(model):
            self.train(False)
            found = self.forward(fast, sets)
        expected = []
        for task, samples in enumerate(sets):
            with undisturbed(self.own):
                for module in self.own.modules():
                    # By the statistics of the batch in hand, as all modes but one normalise it.
                    normalises = isinstance(module, nn.modules.batchnorm._BatchNorm)
                    module.training = normalises and self.norm.mode != "running"
                weights = {name: value[task] for name, value in fast.items()}
                before = generator_state(samples.device)
                outputs: Tensor = torch.func.functional_call(self.own, weights, (samples,))
                silent = torch.equal(before, generator_state(samples.device))
            expected.append(outputs)
            if not silent:  # noise is drawn for the first task alike, and for others after it
                break
        return alike(found[: len(expected)], torch.stack(expected))

    def computing(self) -> AbstractContextManager[None]:
        """To be in while passes of such tasks as :meth:`prepare` was given are computed."""
        return nullcontext()


class HigherInnerLoop(InnerLoop):
    """The reference: one task after another, differentiated by ``higher``.

    The model is made functional once, not once a task, and is handed its parameters at each call,
    so that no module outlives a task with that task's graph in it: that is what leaks when
    ``higher.innerloop_ctx`` is used in a long training.
    """

    tasks_per_pass = 1

    def __init__(self, model: nn.Module, adapted: Sequence[str], **settings: Any) -> None:
        super().__init__(model, adapted, **settings)
        for path, module in model.named_modules():
            if hooked(module):
                where = f" ({path})" if path else ""
                raise ModelError(f"{type(module).__name__}{where} has hooks; higher drops them")
        self._functional = higher.monkeypatch(
            self.norm.model, copy_initial_weights=False, track_higher_grads=False
        )
        # Its copies would not know what is loaded into the model or counted in it.
        for path, functional in self._functional.named_modules():
            functional._buffers.update(self.norm.model.get_submodule(path)._buffers)
        self._idle = [parameter.detach() for parameter in self.parameters.values()]
        self._functional.update_params(self._idle)

    def initial(self, tasks: int, *, create_graph: bool) -> Fast:
        if create_graph:
            return {name: value[None] for name, value in self.parameters.items()}
        return {
            name: value.detach()[None].requires_grad_(value.requires_grad)
            for name, value in self.parameters.items()
        }

    def trajectory(
        self, tasks: Tasks, steps: int, *, create_graph: bool, first_order: bool = False
    ) -> Iterator[Fast]:
        theta = fast = self.initial(len(tasks), create_graph=create_graph)
        optimizer = self._optimizer(create_graph, first_order)
        begun = self.moments()
        self._begin(optimizer, begun)
        yield fast
        for step in range(steps):
            stepped = optimizer.step(
                self.descended(fast, theta, tasks, step),
                params=[fast[name] for name in self.adapted],
                override={"lr": [self.rate(name, step) for name in self.adapted]},
            )
            fast = fast | dict(zip(self.adapted, stepped, strict=True))
            yield fast
        if begun is not NO_MOMENTS:
            self.reached = Moments(_squares(optimizer, self.adapted), begun.after(steps))

    def _vet(self, tasks: Tasks) -> None:
        self._check_reach(self._functional, tasks)
        if not self._faithful(self._functional, tasks.support_inputs[:1]):
            raise ModelError(
                "the model's forward gives something else in the inner loop than by itself; does "
                "it look at the types of its modules?"
            )

    def train(self, training: bool) -> None:
        self._functional.train(training)
        self.norm.start(training)

    def forward(
        self, fast: Fast, inputs: Tensor, *, groups: int = 1, counted: int | None = None
    ) -> Tensor:
        self.norm.count(inputs.shape[1], groups, counted)
        weights = [value[0] for value in fast.values()]
        # The call hands them to each module whose own forward is called; a parent may read a
        # module's weights without calling it, as attention does.
        self._functional.update_params(weights)
        try:
            outputs: Tensor = self._functional(inputs[0], params=weights)
        finally:
            self._functional.update_params(self._idle)
        return unrounded(outputs)[None]

    def _optimizer(
        self, create_graph: bool, first_order: bool
    ) -> higher.optim.DifferentiableOptimizer:
        # The optimizer is told apart from the weights it will step: it only needs to know how many
        # there are, and deep-copies what it is given. Each is a group, so as to have its own rate,
        # which every step names.
        stand_ins = [nn.Parameter(torch.empty(0)) for _ in self.adapted]
        groups = [{"params": [each]} for each in stand_ins]
        prototype: torch.optim.Optimizer
        if self.optimizer == "adam":
            prototype = torch.optim.Adam(groups, lr=1.0, betas=(0.0, BETA2), eps=EPSILON)
        else:
            prototype = torch.optim.SGD(groups, lr=1.0)
        return higher.optim.get_diff_optim(
            prototype,
            stand_ins,
            grad_callback=partial(self._all_shaped, constant=first_order),
            track_higher_grads=create_graph,
        )

    def _begin(self, optimizer: higher.optim.DifferentiableOptimizer, moments: Moments) -> None:
        """Let Adam go on from these moments; ``higher`` counts its steps, and so the mass is
        written as the number of steps that it takes."""
        if moments.mass == 0:
            return
        left = 1 - moments.mass
        steps = math.log(left, BETA2) if left > 0 else math.inf
        for group, name in enumerate(self.adapted):
            square = moments.squares[name]
            optimizer.state[group][0] = {
                "step": steps,
                "exp_avg": torch.zeros_like(square),
                "exp_avg_sq": square,
            }

    def _all_shaped(
        self, gradients: Sequence[Tensor | None], *, constant: bool
    ) -> list[Tensor | None]:
        """The gradients as a step takes them, cut from the graph if constant."""
        return [
            None if g is None else self.shaped(name, g.detach() if constant else g)
            for name, g in zip(self.adapted, gradients, strict=True)
        ]


def _squares(optimizer: higher.optim.DifferentiableOptimizer, names: Sequence[str]) -> Fast:
    """Adam's moments by parameter; of one that never had a gradient there are none."""
    states = ((name, optimizer.state[group][0]) for group, name in enumerate(names))
    return {name: state["exp_avg_sq"].detach() for name, state in states if state}
