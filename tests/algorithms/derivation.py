"""Meta-gradients derived again, from the papers' equations alone.

A small network written as plain functions of a parameter dictionary, its batch normalisation
written out, its tasks looped over, its derivatives by ``torch.autograd`` alone. Nothing here knows
``higher`` or the project's inner loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Parameters = dict[str, Tensor]
Network = Callable[..., Tensor]
SECOND_ORDER = ("maml", "anil", "boil")


class Net(nn.Module):
    """Two conv blocks with affine batch norm, and a linear head: what users bring."""

    def __init__(self, ways: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, 2, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 5, 3, 2, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(5)
        self.head = nn.Linear(5 * 4, ways)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm1(self.conv1(x)))
        x = torch.tanh(self.norm2(self.conv2(x)))
        return self.head(x.flatten(1))


def normalise(x: Tensor, counted: Tensor, p: Parameters, name: str) -> Tensor:
    mean = counted.mean((0, 2, 3), keepdim=True)
    var = ((counted - mean) ** 2).mean((0, 2, 3), keepdim=True)
    scale, shift = (p[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("weight", "bias"))
    return (x - mean) / torch.sqrt(var + 1e-5) * scale + shift


def features(p: Parameters, x: Tensor, counted: int | None = None) -> Tensor:
    """The body on ``x``; batch statistics are those of its first ``counted`` samples."""
    for block in ("1", "2"):
        x = F.conv2d(x, p[f"conv{block}.weight"], None, 2, 1)
        x = torch.tanh(normalise(x, x[:counted], p, f"norm{block}"))
    return x.flatten(1)


def outputs(p: Parameters, x: Tensor, counted: int | None = None) -> Tensor:
    """The network on ``x``."""
    return features(p, x, counted) @ p["head.weight"].T + p["head.bias"]


def query_outputs(
    p: Any, support: Tensor, query: Tensor, norm: str, network: Network = outputs
) -> Tensor:
    if norm in ("transductive", "running"):  # running averages serve evaluation only
        return network(p, query)
    if norm == "support":
        return network(p, torch.cat([support, query]), len(support))[len(support) :]
    return torch.stack([network(p, torch.cat([support, q[None]]))[-1] for q in query])


def inner(
    p: Parameters,
    support: tuple[Tensor, Tensor],
    adapted: list[str],
    *,
    steps: int,
    lr: float,
    optimizer: str,
    create_graph: bool,
    minibatches: Tensor | None = None,
) -> Parameters:
    second_moment = {name: torch.zeros_like(p[name]) for name in adapted}
    for step in range(1, steps + 1):
        x, y = support
        if minibatches is not None:
            x, y = x[minibatches[step - 1]], y[minibatches[step - 1]]
        loss = F.cross_entropy(outputs(p, x), y)
        gradients = torch.autograd.grad(loss, [p[n] for n in adapted], create_graph=create_graph)
        p = dict(p)
        for name, g in zip(adapted, gradients, strict=True):
            if optimizer == "adam":  # beta1 = 0: the first moment is the gradient itself
                second_moment[name] = 0.999 * second_moment[name] + 0.001 * g**2
                scale = (1 - 0.999**step) ** 0.5
                g = scale * g / (second_moment[name].sqrt() + 1e-8)
            p[name] = p[name] - lr * g
            if not create_graph:
                p[name] = p[name].detach().requires_grad_()
    return p


def meta_gradient(
    algorithm: str,
    model: Net,
    batch: dict[str, tuple[Tensor, Tensor]],
    *,
    steps: int,
    lr: float,
    norm: str,
    optimizer: str = "sgd",
    minibatches: Tensor | None = None,
) -> Parameters:
    """The mean over tasks of the paper's meta-gradient, by parameter name."""
    theta = {n: v.detach().clone().requires_grad_() for n, v in model.named_parameters()}
    adapted = [
        n
        for n in theta
        if not (algorithm == "anil" and not n.startswith("head"))
        and not (algorithm == "boil" and n.startswith("head"))
    ]
    tasks = len(batch["train"][0])
    total = {n: torch.zeros_like(v) for n, v in theta.items()}
    for i in range(tasks):
        (xs, ys), (xq, yq) = ((x[i], y[i]) for x, y in (batch["train"], batch["test"]))
        fast = inner(
            theta,
            (xs, ys),
            adapted,
            steps=0 if algorithm == "pretrained" else steps,
            lr=lr,
            optimizer=optimizer,
            create_graph=algorithm in SECOND_ORDER,
            minibatches=None if minibatches is None else minibatches[i],
        )
        if algorithm == "reptile":
            gradients = [theta[n].detach() - fast[n].detach() for n in theta]
        else:
            loss = F.cross_entropy(query_outputs(fast, xs, xq, norm), yq)
            at = fast if algorithm == "fomaml" else theta
            gradients = torch.autograd.grad(loss, [at[n] for n in theta])
        for n, g in zip(theta, gradients, strict=True):
            total[n] += g / tasks
    return total


def rated_gradient(
    model: Net,
    batch: dict[str, tuple[Tensor, Tensor]],
    rates: dict[str, Tensor],
    *,
    weights: list[float],
    norm: str,
    first_order: bool = False,
) -> tuple[Parameters, Parameters]:
    """With a step size for each parameter in each step, ``(steps, *broadcasts over it)``: that of
    sum_j weights_j L_query(theta_j), by parameter and by step size (Li et al. 2017, algorithm 1;
    Antoniou et al. 2019, equation 4)."""
    theta = {n: v.detach().clone().requires_grad_() for n, v in model.named_parameters()}
    rates = {n: v.clone().requires_grad_() for n, v in rates.items()}
    losses = []
    for i in range(len(batch["train"][0])):
        (xs, ys), (xq, yq) = ((x[i], y[i]) for x, y in (batch["train"], batch["test"]))
        p = theta
        for step, weight in enumerate(weights):
            loss = F.cross_entropy(outputs(p, xs), ys)
            gradients = torch.autograd.grad(loss, list(p.values()), create_graph=not first_order)
            p = {n: p[n] - rates[n][step] * g for n, g in zip(theta, gradients, strict=True)}
            losses.append(weight * F.cross_entropy(query_outputs(p, xs, xq, norm), yq))
    loss = torch.stack(losses).sum() / len(batch["train"][0])
    found = torch.autograd.grad(loss, [*theta.values(), *rates.values()])
    split = len(theta)
    by_theta = dict(zip(theta, found[:split], strict=True))
    return by_theta, dict(zip(rates, found[split:], strict=True))


def implicit_gradient(
    model: Net,
    batch: dict[str, tuple[Tensor, Tensor]],
    *,
    steps: int,
    lr: float,
    strength: float,
    norm: str,
    fixed: tuple[str, ...] = (),
) -> Parameters:
    """Implicit MAML's (Rajeswaran et al. 2019, equation 6) by a dense solve, task by task: with
    H the Hessian of the support loss at the end of the inner steps, (I + H / lambda)^-1 times the
    gradient of the query loss there. Parameters in ``fixed`` do not adapt; by the implicit function
    theorem theirs is the direct gradient less the mixed derivatives times that over lambda."""
    theta = {n: v.detach().clone() for n, v in model.named_parameters()}
    sizes = [v.numel() for v in theta.values()]
    start = torch.cat([v.flatten() for v in theta.values()])
    adapts = torch.cat([torch.full((v.numel(),), n not in fixed) for n, v in theta.items()])

    def named(vector: Tensor) -> Parameters:
        parts = vector.split(sizes)
        return {n: p.view(v.shape) for (n, v), p in zip(theta.items(), parts, strict=True)}

    total = torch.zeros_like(start)
    for i in range(len(batch["train"][0])):
        (xs, ys), (xq, yq) = ((x[i], y[i]) for x, y in (batch["train"], batch["test"]))

        def support_loss(vector: Tensor, xs: Tensor = xs, ys: Tensor = ys) -> Tensor:
            return F.cross_entropy(outputs(named(vector), xs), ys)

        phi = start
        for _ in range(steps):
            gradient = torch.func.grad(support_loss)(phi) + strength * (phi - start)
            phi = phi - lr * gradient * adapts
        at = phi.clone().requires_grad_()
        query_loss = F.cross_entropy(query_outputs(named(at), xs, xq, norm), yq)
        (direct,) = torch.autograd.grad(query_loss, at)
        hessian = torch.autograd.functional.hessian(support_loss, phi)
        inner = hessian[adapts][:, adapts]
        solved = torch.linalg.solve(
            torch.eye(len(inner)).to(inner) + inner / strength, direct[adapts]
        )
        total[adapts] += solved
        total[~adapts] += direct[~adapts] - hessian[~adapts][:, adapts] @ solved / strength
    return named(total / len(batch["train"][0]))


def context_gradient(
    model: Net,
    batch: dict[str, tuple[Tensor, Tensor]],
    film: Parameters,
    *,
    steps: int,
    lr: float,
    norm: str,
) -> tuple[Parameters, Parameters]:
    """CAVIA's (Zintgraf et al. 2019, equations 2 and 3), with the context's linear scale and shift
    on the first block's channels before its tanh; by the model's parameters and by the film's."""
    theta = {n: v.detach().clone().requires_grad_() for n, v in model.named_parameters()}
    film = {n: v.clone().requires_grad_() for n, v in film.items()}

    def network(context: Tensor, x: Tensor, counted: int | None = None) -> Tensor:
        made = film["weight"] @ context + film["bias"]
        scale, shift = made[:4].view(1, 4, 1, 1), made[4:].view(1, 4, 1, 1)
        x = F.conv2d(x, theta["conv1.weight"], None, 2, 1)
        x = torch.tanh((1 + scale) * normalise(x, x[:counted], theta, "norm1") + shift)
        x = F.conv2d(x, theta["conv2.weight"], None, 2, 1)
        x = torch.tanh(normalise(x, x[:counted], theta, "norm2"))
        return x.flatten(1) @ theta["head.weight"].T + theta["head.bias"]

    losses = []
    for i in range(len(batch["train"][0])):
        (xs, ys), (xq, yq) = ((x[i], y[i]) for x, y in (batch["train"], batch["test"]))
        context = torch.zeros(film["weight"].shape[1]).to(xs).requires_grad_()
        for _ in range(steps):
            loss = F.cross_entropy(network(context, xs), ys)
            context = context - lr * torch.autograd.grad(loss, context, create_graph=True)[0]
        losses.append(F.cross_entropy(query_outputs(context, xs, xq, norm, network), yq))
    found = torch.autograd.grad(torch.stack(losses).mean(), [*theta.values(), *film.values()])
    split = len(theta)
    by_theta = dict(zip(theta, found[:split], strict=True))
    return by_theta, dict(zip(film, found[split:], strict=True))


def prototype_gradient(
    model: Net, batch: dict[str, tuple[Tensor, Tensor]], *, norm: str
) -> Parameters:
    """Prototypical networks' (Snell et al. 2017, equations 1 and 2), one sample after another."""
    theta = {
        n: v.detach().clone().requires_grad_()
        for n, v in model.named_parameters()
        if not n.startswith("head")
    }
    losses = []
    for i in range(len(batch["train"][0])):
        (xs, ys), (xq, yq) = ((x[i], y[i]) for x, y in (batch["train"], batch["test"]))
        support, query = features(theta, xs), query_outputs(theta, xs, xq, norm, features)
        prototypes = [support[ys == k].mean(0) for k in range(int(ys.max()) + 1)]
        for z, y in zip(query, yq, strict=True):
            exponents = torch.stack([torch.exp(-((z - c) ** 2).sum()) for c in prototypes])
            losses.append(-torch.log(exponents[y] / exponents.sum()))
    loss = torch.stack(losses).mean()
    return dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))


def curved_gradient(
    model: Net,
    batch: dict[str, tuple[Tensor, Tensor]],
    maps: dict[str, list[Tensor]],
    *,
    steps: int,
    lr: float,
    norm: str,
) -> tuple[Parameters, dict[str, list[Tensor]]]:
    """Meta-Curvature's (Park and Oliva 2019): each gradient, as a vector, by the Kronecker product
    of its matrices. By the network's parameters, and by those matrices."""
    theta = {n: v.detach().clone().requires_grad_() for n, v in model.named_parameters()}
    maps = {n: [m.detach().clone().requires_grad_() for m in each] for n, each in maps.items()}
    losses = []
    for i in range(len(batch["train"][0])):
        (xs, ys), (xq, yq) = ((batch[half][0][i], batch[half][1][i]) for half in ("train", "test"))
        p = dict(theta)
        for _ in range(steps):
            loss = F.cross_entropy(outputs(p, xs), ys)
            slopes = torch.autograd.grad(loss, list(p.values()), create_graph=True)
            for (name, value), slope in zip(list(p.items()), slopes, strict=True):
                whole = maps[name][0]
                for matrix in maps[name][1:]:
                    whole = torch.kron(whole, matrix)
                p[name] = value - lr * (whole @ slope.flatten()).view_as(value)
        losses.append(F.cross_entropy(query_outputs(p, xs, xq, norm), yq))
    flat = [m for each in maps.values() for m in each]
    found = torch.autograd.grad(torch.stack(losses).mean(), [*theta.values(), *flat])
    rest = iter(found[len(theta) :])
    by_map = {name: [next(rest) for _ in each] for name, each in maps.items()}
    return dict(zip(theta, found[: len(theta)], strict=True)), by_map


def class_scores(z: Tensor, head: Parameters, scale: float | None) -> Tensor:
    """A linear classifier's scores of features; with a scale, of one by cosines (no bias)."""
    if scale is None:
        return z @ head["weight"].T + head["bias"]
    norms = z.norm(dim=1)[:, None] * head["weight"].norm(dim=1)
    return scale * (z @ head["weight"].T) / norms


def pretraining_gradient(
    model: Net,
    batch: dict[str, tuple[Tensor, Tensor]],
    classifier: Parameters,
    *,
    scale: float | None,
    norm: str,
) -> tuple[Parameters, Parameters]:
    """Chen et al.'s (2019) pre-training: every sample's cross-entropy among all classes. By the
    body's parameters, and by the classifier's."""
    theta = {
        n: v.detach().clone().requires_grad_()
        for n, v in model.named_parameters()
        if not n.startswith("head")
    }
    classifier = {n: v.detach().clone().requires_grad_() for n, v in classifier.items()}
    losses = []
    for i in range(len(batch["train"][0])):
        xs, xq = batch["train"][0][i], batch["test"][0][i]
        classes = torch.cat([half[i] for half in batch["classes"]])
        z = torch.cat([features(theta, xs), query_outputs(theta, xs, xq, norm, features)])
        exponents = class_scores(z, classifier, scale).exp()
        losses += [-torch.log(e[c] / e.sum()) for e, c in zip(exponents, classes, strict=True)]
    loss = torch.stack(losses).mean()
    found = torch.autograd.grad(loss, [*theta.values(), *classifier.values()])
    by_theta = dict(zip(theta, found[: len(theta)], strict=True))
    return by_theta, dict(zip(classifier, found[len(theta) :], strict=True))


def new_heads_losses(
    model: Net,
    batch: dict[str, tuple[Tensor, Tensor]],
    *,
    scale: float | None,
    steps: int,
    lr: float,
    norm: str,
) -> Tensor:
    """Query losses ``(tasks, steps + 1)`` of heads trained on frozen features. The gradient in the
    scores is (p - y) / n; of cosines, the rest is by autograd."""
    theta = {n: v.detach() for n, v in model.named_parameters()}
    rows = []
    for i in range(len(batch["train"][0])):
        (xs, ys), (xq, yq) = ((batch[half][0][i], batch[half][1][i]) for half in ("train", "test"))
        support, query = features(theta, xs), query_outputs(theta, xs, xq, norm, features)
        head = {"weight": theta["head.weight"], "bias": theta["head.bias"]}
        row = []
        for _ in range(steps + 1):
            row.append(F.cross_entropy(class_scores(query, head, scale), yq))
            weight = head["weight"].clone().requires_grad_()
            s = class_scores(support, {"weight": weight, "bias": head["bias"]}, scale)
            slope = (torch.softmax(s, 1) - F.one_hot(ys, s.shape[1])).detach() / len(ys)
            (by_weight,) = torch.autograd.grad((slope * s).sum(), weight)
            head = {
                "weight": head["weight"] - lr * by_weight,
                "bias": head["bias"] - lr * slope.sum(0),
            }
        rows.append(torch.stack(row))
    return torch.stack(rows)


def make_batch(tasks: int = 3, ways: int = 3, shots: int = 2, queries: int = 2, seed: int = 0):
    """Random float64 images with a class signal; labels permuted a task."""
    g = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(tasks, ways, 1, 8, 8, generator=g, dtype=torch.float64)

    def half(n: int) -> tuple[Tensor, Tensor]:
        labels = torch.stack([torch.randperm(ways, generator=g) for _ in range(tasks)])
        y = labels.repeat_interleave(n, dim=1)
        x = torch.stack([prototypes[i, y[i]] for i in range(tasks)])
        return x + 0.5 * torch.randn(x.shape, generator=g, dtype=x.dtype), y

    return {"train": half(shots), "test": half(queries)}
