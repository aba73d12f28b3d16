"""Implicit MAML: Rajeswaran, Finn, Kakade and Levine 2019, Meta-Learning with Implicit Gradients
(arXiv 1909.04630)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.base import Algorithm, AlgorithmError, register
from algorithms.inner_loop import Tasks
from algorithms.losses import task_losses
from algorithms.maml import MAML


@register("imaml")
class IMAML(Algorithm):
    """Differentiate where the inner steps end instead of the steps.

    The inner steps descend L_support(phi) + lambda / 2 ||phi - theta||^2 (equation 3). With H the
    Hessian of L_support at their end phi_i, taken to be the minimum, the meta-gradient is the mean
    of (I + H / lambda)^-1 grad L_query(phi_i) (equation 6), solved by a few steps of conjugate
    gradient (section 3.2) that need products with H alone. For parameters that are meta-learned
    without adapting, it is grad L_query less the mixed derivatives of L_support times that solution
    over lambda.

    Args:
        model: any module, as for :class:`algorithms.Algorithm`.
        proximal: lambda.
        cg_steps: steps of conjugate gradient.
        settings: those of :class:`algorithms.Algorithm`.
    """

    summary = "implicit gradient where the inner steps end (Rajeswaran et al. 2019)"
    defaults = {
        "*": {"inner_lr": 0.05, "inner_steps": 5, "eval_steps": 5},
        "sinusoid": {**MAML.defaults["sinusoid"], "inner_steps": 5},
    }

    def __init__(
        self, model: nn.Module, *, proximal: float = 2.0, cg_steps: int = 5, **settings: Any
    ) -> None:
        for name, value in (("proximal", proximal), ("cg_steps", cg_steps)):
            if not 0 < value < float("inf"):
                raise AlgorithmError(f"{name} is {value}; it must be positive")
        self.proximal = proximal
        self.cg_steps = cg_steps
        super().__init__(model, **settings)

    def meta_gradient(self, tasks: Tasks) -> tuple[Tensor, Sequence[Tensor | None]]:
        fast = self.adapt(tasks, create_graph=False)
        adapted = self.adapted()
        others = [name for name in self.meta_parameters if name not in adapted]
        phi, psi = ([fast[name] for name in names] for names in (adapted, others))
        outputs, losses = self.query_losses(fast, tasks)
        direct = _gradients([losses.sum()], [*phi, *psi])
        predicted = self.inner_loop.forward(fast, tasks.support_inputs)
        support_loss = task_losses(predicted, tasks.support_targets).sum()
        slope = _gradients([support_loss], phi, create_graph=True)

        def product(vector: list[Tensor]) -> list[Tensor]:
            """(I + H / lambda) v."""
            curved = _gradients(slope, phi, vector)
            return [v + c / self.proximal for v, c in zip(vector, curved, strict=True)]

        solution = conjugate_gradient(product, direct[: len(phi)], self.cg_steps)
        gradients = dict(zip(adapted, solution, strict=True))
        for name, own, mixed in zip(
            others, direct[len(phi) :], _gradients(slope, psi, solution), strict=True
        ):
            gradients[name] = own - mixed / self.proximal
        return outputs, [gradients[name].sum(0) for name in self.meta_parameters]

    @classmethod
    def gradients_per_task(cls, settings: Mapping[str, Any]) -> int:
        """Those of the inner steps, one on each of the two sets, and a product with H counted as
        one for each step of conjugate gradient."""
        return int(settings["inner_steps"]) + 2 + int(settings["cg_steps"])


def conjugate_gradient(
    product: Callable[[list[Tensor]], list[Tensor]], target: list[Tensor], steps: int
) -> list[Tensor]:
    """Solve A x = b for each task, from x = 0.

    Args:
        product: A times a vector, for symmetric A.
        target: b; a vector is a list of tensors ``(tasks, ...)``.
        steps: how many. A task is done where its residual is rounding, or where A is not
            positive along the next direction, as may be where the minimum is not reached; if that
            is the first direction, x is b, as if A were the identity. A task that is done stays as
            it is while others go on: to see that all are, a GPU would have to be waited for.
    """
    solution = [torch.zeros_like(b) for b in target]
    residual = direction = target
    size = first = _dot(residual, residual)
    going = size > 0
    for taken in range(steps):
        changed = product(direction)
        curvature = _dot(direction, changed)
        if taken == 0:
            solution = _plus(solution, (curvature <= 0).to(size), target)
        going = going & (curvature > 0) & (size > torch.finfo(size.dtype).eps ** 2 * first)
        step = torch.where(going, size / curvature, 0.0)
        solution = _plus(solution, step, direction)
        residual = _plus(residual, -step, changed)
        before, size = size, _dot(residual, residual)
        direction = _plus(residual, torch.where(going, size / before, 0.0), direction)
    return solution


def _gradients(
    of: Sequence[Tensor],
    at: Sequence[Tensor],
    along: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
) -> list[Tensor]:
    """Gradients of tensors, weighted by ``along``; zeros where there is none. The graph stays."""
    weights = along or [torch.ones_like(each) for each in of]
    depending = [(o, w) for o, w in zip(of, weights, strict=True) if o.requires_grad]
    if not depending or not at:
        return [torch.zeros_like(each) for each in at]
    outputs, weighted = zip(*depending, strict=True)
    return list(
        torch.autograd.grad(
            outputs,
            at,
            weighted,
            retain_graph=True,
            create_graph=create_graph,
            materialize_grads=True,
        )
    )


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Of each task: ``(tasks,)``."""
    products = [(x * y).reshape(len(x), -1).sum(1) for x, y in zip(a, b, strict=True)]
    return torch.stack(products).sum(0)


def _plus(a: Sequence[Tensor], scale: Tensor, b: Sequence[Tensor]) -> list[Tensor]:
    """a + scale b, with a scale for each task."""
    pairs = zip(a, b, strict=True)
    return [x + scale.view(-1, *(1,) * (x.dim() - 1)) * y for x, y in pairs]
