"""What an algorithm is: parameters to meta-learn, a meta-gradient, and an evaluation."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from typing import Any, ClassVar, TypeVar, get_type_hints

import torch
from torch import Tensor, nn

from algorithms.batched import BatchedInnerLoop
from algorithms.inner_loop import (
    OPTIMIZERS,
    Fast,
    HigherInnerLoop,
    InnerLoop,
    Tasks,
    UnsupportedError,
)
from algorithms.losses import task_losses, task_metrics
from algorithms.normalisation import MODES

Batch = Mapping[str, Sequence[Tensor]]
"""``{"train": (inputs, targets), "test": (inputs, targets)}``, torchmeta's batch."""

ENGINES = ("auto", "higher", "batched")


class AlgorithmError(ValueError):
    """What was asked of an algorithm cannot be had; the message is one line and says what can."""


@dataclass(frozen=True)
class Scores:
    """Loss and metric on query sets, detached: ``(tasks,)``, or ``(tasks, steps + 1)``."""

    loss: Tensor
    metric: Tensor


class Algorithm(ABC):
    """A meta-learning algorithm over any model, written against the inner loop alone.

    A subclass says what its meta-gradient is (:meth:`meta_gradient`) and, where that is not all of
    them, which parameters adapt (:meth:`adapted`).

    Args:
        model: any ``nn.Module``; its parameters that require a gradient are the meta-parameters,
            and are learned in place. Names in its attribute ``outer_only``, if it has one, are
            meta-learned but never adapt.
        inner_lr: step size alpha of the inner loop.
        inner_steps: inner steps of a meta-step; also of an evaluation that names no other number.
        inner_optimizer: ``"sgd"``, or ``"adam"`` with beta1 = 0.
        inner_clip: bound on each element of the inner gradient.
        inner_batch: support samples an inner step of meta-training uses, cycling through a shuffled
            support set as Reptile does; None uses the whole set.
        eval_batch: the same for evaluation.
        norm: whose statistics batch normalisation uses; see :mod:`algorithms.normalisation`.
        engine: ``"batched"`` adapts all tasks at once, ``"higher"`` one after another; ``"auto"``
            is batched where the model can be, else higher.

    Attributes:
        engine: the engine that runs, ``"batched"`` or ``"higher"``.
        engine_reason: why ``"auto"`` came to ``"higher"``, in one line; else empty.

    Raises:
        AlgorithmError: a hyperparameter out of its range, or a model without parameters.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for ``python -m bench list algorithms``."""
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Settings that suit the algorithm, by dataset; those under ``"*"`` hold for every dataset.
    Hyperparameters of the class, and of its outer loop (``meta_lr``, ``meta_optimizer``, ...)."""

    def __init__(
        self,
        model: nn.Module,
        *,
        inner_lr: float = 0.4,
        inner_steps: int = 1,
        inner_optimizer: str = "sgd",
        inner_clip: float | None = None,
        inner_batch: int | None = None,
        eval_batch: int | None = None,
        norm: str = "transductive",
        engine: str = "auto",
    ) -> None:
        _positive(inner_lr=inner_lr, inner_clip=inner_clip)
        _positive(inner_steps=inner_steps, inner_batch=inner_batch, eval_batch=eval_batch)
        _one_of(OPTIMIZERS, inner_optimizer=inner_optimizer)
        _one_of(MODES, norm=norm)
        _one_of(ENGINES, engine=engine)
        self.model = model
        self.inner_steps = inner_steps
        self.inner_batch = inner_batch
        self.eval_batch = eval_batch
        self.meta_parameters: dict[str, nn.Parameter] = {
            name: value for name, value in model.named_parameters() if value.requires_grad
        }
        if not self.meta_parameters:
            raise AlgorithmError("the model has no parameters that require a gradient")
        self._inner_settings = {
            "lr": inner_lr,
            "optimizer": inner_optimizer,
            "clip": inner_clip,
            "norm": norm,
        }
        self._asked_engine = engine
        self.engine_reason = ""
        try:
            self._run_on("batched" if engine == "auto" else engine)
        except UnsupportedError as objection:
            self._yield_to_higher(str(objection))
        except ValueError as error:
            raise AlgorithmError(str(error)) from error

    def _run_on(self, engine: str) -> None:
        loop = BatchedInnerLoop if engine == "batched" else HigherInnerLoop
        self.inner_loop: InnerLoop = loop(self.model, self.adapted(), **self._inner_settings)
        self.engine = engine

    def _yield_to_higher(self, reason: str) -> None:
        if self._asked_engine != "auto":
            raise AlgorithmError(f"{reason}; engine 'higher' can run it")
        self._run_on("higher")
        self.engine_reason = reason

    # What an algorithm says of itself.

    @abstractmethod
    def meta_gradient(self, tasks: Tasks) -> tuple[Tensor, Sequence[Tensor | None]]:
        """The meta-gradient of some tasks.

        Returns:
            The adapted model's outputs for the query sets ``(tasks, m, out)``, and for each of
            :meth:`parameters` the gradient *summed* over the tasks (None where there is none).
        """

    def adapted(self) -> list[str]:
        """Names of the parameters that the inner loop changes: all, unless a subclass differs."""
        outer_only = getattr(self.model, "outer_only", ())
        return [name for name in self.meta_parameters if name not in outer_only]

    # What it is written with.

    def adapt(self, tasks: Tasks, *, create_graph: bool) -> Fast:
        """theta' after ``inner_steps`` steps on the support sets: the last of the trajectory."""
        *_, last = self.inner_loop.trajectory(tasks, self.inner_steps, create_graph=create_graph)
        return last

    def query_losses(self, fast: Fast, tasks: Tasks) -> tuple[Tensor, Tensor]:
        """Outputs ``(tasks, m, out)`` and mean losses ``(tasks,)`` on the query sets at theta'."""
        outputs = self.inner_loop.query(fast, tasks)
        return outputs, task_losses(outputs, tasks.query_targets)

    # What users call.

    def parameters(self) -> list[nn.Parameter]:
        """The meta-parameters, for an outer optimizer."""
        return list(self.meta_parameters.values())

    def meta_backward(self, batch: Batch) -> Scores:
        """Set ``.grad`` of each meta-parameter to the meta-gradient: the mean over the tasks.

        Args:
            batch: torchmeta's batch of B tasks.

        Returns:
            Loss and metric ``(B,)`` on the query sets after adaptation.
        """
        tasks = self._tasks(batch, self.inner_batch, self.inner_steps)
        self._prepare(tasks)
        parameters = self.parameters()
        totals = [torch.zeros_like(parameter) for parameter in parameters]
        parts: list[Scores] = []
        self.inner_loop.train(True)
        with torch.enable_grad():
            for part in tasks.split(self.inner_loop.tasks_per_pass):
                outputs, gradients = self.meta_gradient(part)
                parts.append(_scores(outputs.detach(), part))
                for total, gradient in zip(totals, gradients, strict=True):
                    if gradient is not None:
                        total.add_(gradient.detach(), alpha=1 / len(tasks))
        self.inner_loop.norm.finish()
        for parameter, total in zip(parameters, totals, strict=True):
            parameter.grad = total
        return _merged(torch.cat, parts)

    def evaluate(self, batch: Batch, steps: int | None = None) -> Scores:
        """Adapt to each task and score it on its query set; changes nothing that is learned.

        Args:
            batch: torchmeta's batch of B tasks.
            steps: inner steps; None takes those of meta-training.

        Returns:
            Loss and metric ``(B, steps + 1)``, after 0, 1, ... ``steps`` steps.
        """
        steps = self.inner_steps if steps is None else steps
        if steps < 0:
            raise AlgorithmError(f"steps is {steps}; it must be at least 0")
        tasks = self._tasks(batch, self.eval_batch, steps, generator=torch.Generator())
        self._prepare(tasks)
        parts: list[Scores] = []
        self.inner_loop.train(False)
        for part in tasks.split(self.inner_loop.tasks_per_pass):
            with torch.enable_grad():
                after_steps = []
                for fast in self.inner_loop.trajectory(part, steps, create_graph=False):
                    with torch.no_grad():
                        after_steps.append(_scores(self.inner_loop.query(fast, part), part))
            parts.append(_merged(torch.stack, after_steps, dim=1))
        return _merged(torch.cat, parts)

    def _prepare(self, tasks: Tasks) -> None:
        try:
            self.inner_loop.prepare(tasks)
        except UnsupportedError as objection:
            self._yield_to_higher(str(objection))

    def _tasks(
        self, batch: Batch, size: int | None, steps: int, generator: torch.Generator | None = None
    ) -> Tasks:
        tasks = Tasks.of(batch, like=next(iter(self.meta_parameters.values())))
        support = tasks.support_inputs.shape[1]
        if size is None or size >= support:
            return tasks
        if generator is None:
            drawn = torch.stack([_cycled(support, size, steps, None) for _ in range(len(tasks))])
        else:
            # The same draws for every task: they may not depend on how tasks are put into batches,
            # and the order of samples within a class is random already.
            drawn = _cycled(support, size, steps, generator.manual_seed(0))
            drawn = drawn.expand(len(tasks), *drawn.shape)
        return replace(tasks, minibatches=drawn.to(tasks.support_inputs.device))


def head_names(model: nn.Module) -> list[str]:
    """Names of the head's parameters: of ``model.head``, or of the last module with parameters."""
    head = getattr(model, "head", None)
    if not isinstance(head, nn.Module):
        head = [m for m in model.modules() if list(m.parameters(recurse=False))][-1]
    inside = {id(parameter) for parameter in head.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in inside]


def _scores(outputs: Tensor, tasks: Tasks) -> Scores:
    targets = tasks.query_targets
    return Scores(task_losses(outputs, targets), task_metrics(outputs, targets))


def _merged(how: Callable[..., Tensor], parts: Sequence[Scores], **along: int) -> Scores:
    """Scores of several passes or steps as one, by ``torch.cat`` or ``torch.stack``."""
    loss = how([part.loss for part in parts], **along)
    return Scores(loss, how([part.metric for part in parts], **along))


def _cycled(count: int, size: int, steps: int, generator: torch.Generator | None) -> Tensor:
    """``steps`` mini-batches of ``size`` of ``count`` samples, ``(steps, size)``: a shuffled set is
    used up before it is shuffled again, as in Reptile's code."""
    rounds = -(-steps * size // count)
    order = [torch.randperm(count, generator=generator) for _ in range(rounds)]
    return torch.cat([*order, torch.empty(0, dtype=torch.int64)])[: steps * size].view(steps, size)


def _positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not 0 < value < float("inf"):
            raise AlgorithmError(f"{name} is {value}; it must be positive")


def _one_of(known: Sequence[str], **values: str) -> None:
    for name, value in values.items():
        if value not in known:
            raise AlgorithmError(f"{name} is {value!r}; it must be one of {', '.join(known)}")


_registry: dict[str, type[Algorithm]] = {}
A = TypeVar("A", bound=type[Algorithm])


def register(name: str) -> Callable[[A], A]:
    """Class decorator: make an :class:`Algorithm` known under ``name``.

    Raises:
        AlgorithmError: another class has the name.
    """

    def add(algorithm: A) -> A:
        known = _registry.get(name, algorithm)
        # A file that is run again brings the same class again.
        if (known.__module__, known.__qualname__) != (algorithm.__module__, algorithm.__qualname__):
            raise AlgorithmError(f"two algorithms are called {name!r}")
        algorithm.name = name
        _registry[name] = algorithm
        return algorithm

    return add


def names() -> list[str]:
    """Every registered algorithm: the built-in ones, then those that other packages added."""
    package = importlib.import_module("algorithms")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"algorithms.{module.name}")
    for entry in entry_points(group="bench.algorithms"):
        if entry.name not in _registry:
            register(entry.name)(entry.load())
    return list(_registry)


def get(name: str) -> type[Algorithm]:
    """The class registered under ``name``.

    Raises:
        AlgorithmError: no such name; the message has the nearest one.
    """
    if name not in _registry and name not in names():  # looking for packages takes milliseconds
        near = difflib.get_close_matches(name, _registry, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(_registry)}"
        raise AlgorithmError(f"no algorithm is called {name!r}; {hint}")
    return _registry[name]


def hyperparameters(algorithm: type[Algorithm]) -> dict[str, Any]:
    """The hyperparameters that a class takes, with the values it gives them itself."""
    found: dict[str, Any] = {}
    for ancestor in reversed(algorithm.__mro__):
        if "__init__" in vars(ancestor) and ancestor is not object:
            for name, parameter in inspect.signature(ancestor).parameters.items():
                if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                    found[name] = parameter.default
    return found


def hyperparameter_types(algorithm: type[Algorithm]) -> dict[str, Any]:
    """The types of a class's hyperparameters; a class of other hands may leave some unsaid."""
    found: dict[str, Any] = {}
    for ancestor in reversed(algorithm.__mro__):
        if "__init__" in vars(ancestor) and ancestor is not object:
            with suppress(NameError):  # a name that its file imports for type checkers alone
                found |= get_type_hints(vars(ancestor)["__init__"])
    return found


def create(name: str, model: nn.Module, **settings: Any) -> Algorithm:
    """Make a registered algorithm over a model.

    Raises:
        AlgorithmError: an unknown algorithm, an unknown hyperparameter or a value out of range.
    """
    algorithm = get(name)
    known = hyperparameters(algorithm)
    for setting in settings:
        if setting not in known:
            raise AlgorithmError(f"{name} has no {setting!r}; it has {', '.join(known)}")
    return algorithm(model, **settings)
