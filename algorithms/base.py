"""What an algorithm is: parameters to meta-learn, a meta-gradient, and an evaluation."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import entry_points
from typing import Any, ClassVar, TypeVar, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from algorithms.batched import BatchedInnerLoop
from algorithms.cuda_graphs import RecordingError, Recordings
from algorithms.inner_loop import (
    NO_MOMENTS,
    OPTIMIZERS,
    Fast,
    HigherInnerLoop,
    InnerLoop,
    ModelError,
    Moments,
    Tasks,
    UnsupportedError,
)
from algorithms.losses import task_losses, task_metrics
from algorithms.normalisation import MODES, copied
from algorithms.precision import PRECISIONS, products_in

Batch = Mapping[str, Sequence[Tensor]]
"""``{"train": (inputs, targets), "test": (inputs, targets)}``, torchmeta's batch; what else is in
it is for the algorithms that say so."""

ENGINES = ("auto", "higher", "batched")


class AlgorithmError(ValueError):
    """What was asked of an algorithm cannot be had; the message is one line and says what can."""


@dataclass(frozen=True)
class Scores:
    """Loss and metric on query sets, detached: ``(tasks,)``, or ``(tasks, steps + 1)``."""

    loss: Tensor
    metric: Tensor

    @classmethod
    def merged(
        cls, parts: Sequence[Scores], how: Callable[..., Tensor] = torch.cat, **along: int
    ) -> Scores:
        """Those of several passes or steps as one, by ``torch.cat`` or ``torch.stack``."""
        loss = how([part.loss for part in parts], **along)
        return cls(loss, how([part.metric for part in parts], **along))


R = TypeVar("R")


class Algorithm(ABC):
    """A meta-learning algorithm over any model, written against the inner loop alone.

    A subclass says what its meta-gradient is (:meth:`meta_gradient`) and, where it differs, which
    parameters adapt (:meth:`adapted`), by what steps (:meth:`rate`, :meth:`direction`), in what
    network (:meth:`made_network`), and how it predicts (:meth:`predictions`). The keyword arguments
    of its ``__init__`` are its hyperparameters; those of this class are too if it takes
    ``**settings``.

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
        checkpoint_inner: keep of each inner step only the weights it starts from and compute it
            again in the backward pass, so that memory hardly grows with the steps; the batched
            engine's.
        precision: of float32 products: ``"float32"``, or ``"tf32"`` or ``"bf16"``, which GPUs take
            faster; see :mod:`algorithms.precision`.
        cuda_graphs: record the computations on a GPU and launch them whole from then on; see
            :mod:`algorithms.cuda_graphs`.
        tasks_per_pass: adapt at most so many tasks at once, for less memory and the same gradient;
            None lets the engine choose.

    Attributes:
        network: what the inner loop runs: the model, or a structure over its parameters.
        meta_parameters: the network's parameters that are meta-learned, by name.
        beside: what is meta-learned beside the network's parameters, by name.
        carried: what a meta-step leaves to the next one, and to evaluations, besides gradients, by
            name; processes that share a training average it, as they do gradients.
        task_seeds: seeds of the mini-batches that are drawn for each task of the batches to come,
            so that they do not hang on which process has the task; None, its value otherwise, draws
            them from torch's generator.
        progress: share of the meta-training that is done, from 0 to 1; a training loop sets it for
            algorithms that anneal, to which 1, its value otherwise, means the end.
        proximal: lambda of :class:`algorithms.inner_loop.InnerLoop`: how strongly the inner steps
            are held to where they began.
        engine: the engine that runs, ``"batched"`` or ``"higher"``.
        engine_reason: why ``"auto"`` came to ``"higher"``, in one line; else empty.

    Raises:
        AlgorithmError: a hyperparameter out of its range, a model without parameters, or names in
            its ``outer_only`` that are none of theirs.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for ``python -m bench list algorithms``."""
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Settings that suit the algorithm, by dataset; those under ``"*"`` hold for every dataset.
    Hyperparameters of the class, and of its outer loop (``meta_lr``, ``meta_optimizer``, ...)."""
    without: ClassVar[frozenset[str]] = frozenset()
    """Hyperparameters of its ancestors of which nothing would come: it is made with them, as the
    others are, but they are no settings of it."""
    proximal: float = 0.0
    task_seeds: Sequence[int] | None = None

    def __init__(
        self,
        model: nn.Module,
        *,
        inner_lr: float = 0.1,
        inner_steps: int = 1,
        inner_optimizer: str = "sgd",
        inner_clip: float | None = None,
        inner_batch: int | None = None,
        eval_batch: int | None = None,
        norm: str = "transductive",
        engine: str = "auto",
        checkpoint_inner: bool = False,
        tasks_per_pass: int | None = None,
        precision: str = "float32",
        cuda_graphs: bool = False,
    ) -> None:
        _positive(inner_lr=inner_lr, inner_clip=inner_clip)
        _positive(inner_steps=inner_steps, inner_batch=inner_batch, eval_batch=eval_batch)
        _positive(tasks_per_pass=tasks_per_pass)
        _one_of(OPTIMIZERS, inner_optimizer=inner_optimizer)
        _one_of(MODES, norm=norm)
        _one_of(ENGINES, engine=engine)
        _one_of(PRECISIONS, precision=precision)
        self.model = model
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.inner_batch = inner_batch
        self.eval_batch = eval_batch
        self.precision = precision
        self.cuda_graphs = cuda_graphs
        self.recordings = Recordings()
        if cuda_graphs and (checkpoint_inner or norm == "running"):
            other = "checkpoint_inner" if checkpoint_inner else "norm 'running'"
            raise AlgorithmError(f"cuda_graphs does not go with {other}")
        if not any(value.requires_grad for value in model.parameters()):
            raise AlgorithmError("the model has no parameters that require a gradient")
        _check_outer_only(model)
        self.network = self.made_network()
        self.meta_parameters: dict[str, nn.Parameter] = {
            name: value for name, value in self.network.named_parameters() if value.requires_grad
        }
        self.beside: dict[str, nn.Parameter] = {}
        self.carried: dict[str, Tensor] = {}
        self._inner_settings: dict[str, Any] = {
            "rate": self.rate,
            "direction": self.direction,
            "optimizer": inner_optimizer,
            "moments": self.moments,
            "clip": inner_clip,
            "proximal": self.proximal,
            "norm": norm,
        }
        self._batched_settings: dict[str, Any] = {
            "checkpoint_inner": checkpoint_inner,
            "most_tasks": tasks_per_pass,
        }
        self._asked_engine = engine
        self._progress, self.anneals = 1.0, False
        self.engine_reason = ""
        try:
            self._run_on("batched" if engine == "auto" else engine)
        except UnsupportedError as objection:
            self._yield_to_higher(str(objection))
        except ValueError as error:
            raise AlgorithmError(str(error)) from error

    def _run_on(self, engine: str) -> None:
        shared = self._inner_settings
        if engine == "batched":
            settings = shared | self._batched_settings
            self.inner_loop: InnerLoop = BatchedInnerLoop(self.network, self.adapted(), **settings)
        elif self._batched_settings["checkpoint_inner"]:
            raise AlgorithmError("checkpoint_inner needs the batched engine")
        else:
            self.inner_loop = HigherInnerLoop(self.network, self.adapted(), **shared)
        self.engine = engine

    def _yield_to_higher(self, reason: str) -> None:
        if self._asked_engine != "auto":
            raise AlgorithmError(f"{reason}; engine 'higher' may run it")
        try:
            self._run_on("higher")
        except ValueError as error:
            raise AlgorithmError(f"{error}: {reason}") from None
        self.engine_reason = reason

    @property
    def progress(self) -> float:
        """Share of the meta-training that is done; see above."""
        self.anneals = True
        return self._progress

    @progress.setter
    def progress(self, done: float) -> None:
        self._progress = done

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
        outer_only = getattr(self.network, "outer_only", ())
        return [name for name in self.meta_parameters if name not in outer_only]

    def rate(self, name: str, step: int) -> float | Tensor:
        """Step size of a parameter in an inner step (from 0): alpha, unless a subclass differs; a
        tensor that broadcasts over the parameter may be one of :attr:`beside`."""
        return self.inner_lr

    def direction(self, name: str, gradient: Tensor) -> Tensor:
        """What an inner step takes for a parameter's gradient ``(tasks, *shape)``: the gradient
        itself, unless a subclass differs; what changes it may be in :attr:`beside`."""
        return gradient

    def moments(self) -> Moments:
        """What an inner Adam knows when it begins a task: nothing, unless a subclass differs."""
        return NO_MOMENTS

    def made_network(self) -> nn.Module:
        """What the inner loop runs: the model, unless a subclass differs; called once."""
        return self.model

    def predictions(self, tasks: Tasks, steps: int) -> Iterator[Tensor]:
        """Outputs for the query sets ``(tasks, m, out)`` after 0, 1, ... ``steps`` inner steps,
        without a graph."""
        for fast in self.inner_loop.trajectory(tasks, steps, create_graph=False):
            with torch.no_grad():
                outputs = self.inner_loop.query(fast, tasks)
            yield outputs

    @classmethod
    def gradients_per_task(cls, settings: Mapping[str, Any]) -> int:
        """Gradients that a meta-step evaluates for a task, with these hyperparameters: one an inner
        step and one on the query set, unless a subclass differs."""
        return int(settings.get("inner_steps", 0)) + 1

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
        return [*self.meta_parameters.values(), *self.beside.values()]

    def state_dict(self) -> dict[str, Tensor]:
        """All that meta-training changes: the model's state, and :attr:`beside` and
        :attr:`carried` under names that begin with the algorithm's."""
        return self.model.state_dict() | self._beside_state()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Bring back what :meth:`state_dict` gave."""
        beside = self._beside_state()
        self.model.load_state_dict({n: v for n, v in state.items() if n not in beside})
        for name, value in beside.items():
            value.copy_(state[name])

    def _beside_state(self) -> dict[str, Tensor]:
        beside = self.beside | self.carried
        return {f"{self.name}/{name}": value.detach() for name, value in beside.items()}

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
        totals: list[Tensor | None] = [None for _ in parameters]
        parts: list[Scores] = []
        self.inner_loop.train(True)
        with torch.enable_grad(), self._computing(tasks):
            for part in tasks.split(self.inner_loop.tasks_per_pass):
                outputs, gradients = self._run("meta-gradient", self.meta_gradient, part)
                parts.append(_scores(outputs.detach(), part))
                for index, gradient in enumerate(gradients):
                    if gradient is not None:
                        share, total = gradient.detach() / len(tasks), totals[index]
                        totals[index] = share if total is None else total.add_(share)
        self.inner_loop.norm.finish()
        for parameter, total in zip(parameters, totals, strict=True):
            parameter.grad = torch.zeros_like(parameter) if total is None else total
        return Scores.merged(parts)

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
            with torch.enable_grad(), self._computing(tasks):
                predicted = self._run(("predictions", steps), partial(self._predicted, steps), part)
                after_steps = [_scores(outputs, part) for outputs in predicted]
            parts.append(Scores.merged(after_steps, torch.stack, dim=1))
        return Scores.merged(parts)

    def _predicted(self, steps: int, tasks: Tasks) -> list[Tensor]:
        return list(self.predictions(tasks, steps))

    @contextmanager
    def _computing(self, tasks: Tasks) -> Iterator[None]:
        precision = products_in(self.precision, tasks.query_inputs.device)
        # Of torch's kernels for attention this one alone can be differentiated twice.
        attention = sdpa_kernel(SDPBackend.MATH)
        with precision, attention, self.inner_loop.computing():
            yield

    def _run(self, what: Hashable, function: Callable[[Tasks], R], tasks: Tasks) -> R:
        """What a function makes of tasks; by a CUDA graph, if it shall be, in memory that the next
        run writes over."""
        if not self.cuda_graphs:
            return function(tasks)
        kind = tasks.support_inputs.device.type
        if kind in ("cpu", "mps", "xpu"):
            raise AlgorithmError(f"cuda_graphs is for NVIDIA GPUs, not for {kind}")
        if self.carried:
            raise AlgorithmError(f"cuda_graphs does not go with what {self.name} carries over")
        # The numbers that it computes with, as far as they can be seen, are in the key.
        numbers = {n: v for n, v in vars(self).items() if isinstance(v, int | float | str)}
        del numbers["_progress"]
        model = self.model
        state = [*model.parameters(), *model.buffers(), *self.beside.values()]
        try:
            found: R = self.recordings.run((what, *numbers.items()), function, tasks, state)
        except RecordingError as error:
            raise AlgorithmError(f"cuda_graphs: {self.name} cannot be recorded: {error}") from error
        if self.anneals:
            raise AlgorithmError(
                f"cuda_graphs: {self.name} changes with the progress of training, and what is "
                "recorded does not"
            )
        return found

    def _prepare(self, tasks: Tasks) -> None:
        try:
            with products_in("float32", tasks.query_inputs.device):
                self.inner_loop.prepare(tasks)
        except UnsupportedError as objection:
            self._yield_to_higher(str(objection))
            self._prepare(tasks)
        except ModelError as error:
            raise AlgorithmError(str(error)) from error

    def _tasks(
        self, batch: Batch, size: int | None, steps: int, generator: torch.Generator | None = None
    ) -> Tasks:
        tasks = Tasks.of(batch, like=next(self.model.parameters()))
        support = tasks.support_inputs.shape[1]
        if size is None or size >= support:
            return tasks
        if generator is None:
            own: Sequence[torch.Generator | None] = [None] * len(tasks)
            if self.task_seeds is not None:
                own = [torch.Generator().manual_seed(seed) for seed in self.task_seeds]
            drawn = torch.stack([_cycled(support, size, steps, each) for each in own])
        else:
            # The same draws for every task: they may not depend on how tasks are put into batches,
            # and the order of samples within a class is random already.
            drawn = _cycled(support, size, steps, generator.manual_seed(0))
            drawn = drawn.expand(len(tasks), *drawn.shape)
        return replace(tasks, minibatches=drawn.to(tasks.support_inputs.device))


def head_of(model: nn.Module) -> nn.Module:
    """The head: ``model.head``, or else the last module with parameters."""
    head = getattr(model, "head", None)
    if not isinstance(head, nn.Module):
        head = [m for m in model.modules() if list(m.parameters(recurse=False))][-1]
    return head


def head_names(model: nn.Module) -> list[str]:
    """Names of the head's parameters."""
    inside = {id(parameter) for parameter in head_of(model).parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in inside]


def replaced(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """A copy of a model's structure, over its parameters and buffers, with a module replaced."""
    if model is old:
        return new
    # What is known to deepcopy as copied already stays what it is.
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    try:
        return copied(model, {**shared, id(old): new})
    except ValueError as error:
        raise AlgorithmError(str(error)) from error


def _scores(outputs: Tensor, tasks: Tasks) -> Scores:
    targets = tasks.query_targets
    losses = task_losses(outputs, targets)
    return Scores(losses, task_metrics(outputs, targets, losses))


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


def _check_outer_only(model: nn.Module) -> None:
    outer_only = getattr(model, "outer_only", ())
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if isinstance(outer_only, str) or not names.issuperset(outer_only):
        raise AlgorithmError(
            f"outer_only is {outer_only!r}; it must be names of the model's parameters, such as "
            f"{min(names)!r}"
        )


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
    _import_built_in()
    for entry in entry_points(group="bench.algorithms"):
        if entry.name not in _registry:
            try:
                register(entry.name)(entry.load())
            except Exception as error:  # a fault of that package, and no reason to do without all
                offered = f"{entry.value}, offered as algorithm {entry.name!r}"
                warnings.warn(f"{offered}, cannot be loaded: {error}", stacklevel=2)
    return list(_registry)


def _import_built_in() -> None:
    package = importlib.import_module("algorithms")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"algorithms.{module.name}")


def get(name: str) -> type[Algorithm]:
    """The class registered under ``name``.

    Raises:
        AlgorithmError: no such name; the message has the nearest one.
    """
    if name not in _registry:
        _import_built_in()
    if name not in _registry and name not in names():  # looking for packages takes milliseconds
        near = difflib.get_close_matches(name, _registry, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(_registry)}"
        raise AlgorithmError(f"no algorithm is called {name!r}; {hint}")
    return _registry[name]


def hyperparameters(algorithm: type[Algorithm]) -> dict[str, Any]:
    """The hyperparameters that a class takes, with the values it gives them itself: the keyword
    arguments of its ``__init__``, and of its ancestors' as long as ``**settings`` go on to them."""
    found: dict[str, Any] = {}
    for ancestor in algorithm.__mro__:
        if "__init__" in vars(ancestor):
            taken = inspect.signature(ancestor).parameters.values()
            own = {p.name: p.default for p in taken if p.kind is inspect.Parameter.KEYWORD_ONLY}
            found = own | found
            if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in taken):
                break
    return {name: value for name, value in found.items() if name not in algorithm.without}


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
        if setting not in known and setting not in algorithm.without:
            raise AlgorithmError(f"{name} has no {setting!r}; it has {', '.join(known)}")
    return algorithm(model, **settings)
