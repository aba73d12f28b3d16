"""Meta-gradients derived again, from the papers' equations alone.

A small network written as plain functions of a parameter dictionary, its batch normalisation
written out, its tasks looped over, its derivatives by ``torch.autograd`` alone. Nothing here knows
``higher`` or the project's inner loop.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Parameters = dict[str, Tensor]


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


def outputs(p: Parameters, x: Tensor, counted: int | None = None) -> Tensor:
    """The network on ``x``; batch statistics are those of its first ``counted`` samples."""
    for block in ("1", "2"):
        x = F.conv2d(x, p[f"conv{block}.weight"], None, 2, 1)
        x = torch.tanh(normalise(x, x[:counted], p, f"norm{block}"))
    return x.flatten(1) @ p["head.weight"].T + p["head.bias"]


def query_outputs(p: Parameters, support: Tensor, query: Tensor, norm: str) -> Tensor:
    if norm in ("transductive", "running"):  # running averages serve evaluation only
        return outputs(p, query)
    if norm == "support":
        return outputs(p, torch.cat([support, query]), len(support))[len(support) :]
    return torch.stack([outputs(p, torch.cat([support, q[None]]))[-1] for q in query])


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
    adapted = [n for n in theta if algorithm != "anil" or n.startswith("head")]
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
            create_graph=algorithm in ("maml", "anil"),
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
