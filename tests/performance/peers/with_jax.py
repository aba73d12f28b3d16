"""The meta-step in JAX: ``jit`` of ``grad`` of ``vmap`` over tasks.

Convolutions are written as im2col and a matrix product: JAX's convolution primitive with weights
that differ by task becomes a grouped convolution, which on a CPU is many times slower.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from tests.performance.peers.work import Work

jax.config.update("jax_enable_x64", True)  # allows float64; the work's arrays say which it is

Parameters = dict[str, Array]


def prepare(work: Work) -> Callable[[], dict[str, Array]]:
    """The meta-step of some work, compiled."""
    setting = work.setting
    theta = {name: jnp.asarray(value) for name, value in work.weights.items()}
    batch = tuple(jnp.asarray(a if a.dtype.kind == "f" else a.astype("int32")) for a in work.batch)
    first_order = setting.kind != "maml"

    def query_losses(theta: Parameters, *task: Array) -> Array:
        """After each step for an evaluation, else after the last."""
        x_support, y_support, x_query, y_query = task
        adapted = {name: theta[name] for name in work.adapted}

        def query_loss(fast: Parameters) -> Array:
            return loss_of(outputs(theta | fast, x_query), y_query)

        def step(fast: Parameters, _: None) -> tuple[Parameters, Array | None]:
            loss = query_loss(fast) if setting.kind == "evaluation" else None
            found = jax.grad(lambda p: loss_of(outputs(theta | p, x_support), y_support))(fast)
            if first_order:
                found = jax.lax.stop_gradient(found)
            return {name: value - setting.lr * found[name] for name, value in fast.items()}, loss

        # A scan and not a Python loop: XLA takes minutes to compile ten steps one after another.
        fast, losses = jax.lax.scan(step, adapted, length=setting.steps)
        last = query_loss(fast)[None]
        return last if losses is None else jnp.concatenate([losses, last])

    def of_tasks(theta: Parameters, *tasks: Array) -> Array:
        return jax.vmap(query_losses, (None, 0, 0, 0, 0))(theta, *tasks)

    if setting.kind == "evaluation":
        program = jax.jit(lambda *a: {"loss": of_tasks(*a)})
    else:
        program = jax.jit(jax.grad(lambda *a: of_tasks(*a).mean()))
    compiled = program.lower(theta, *batch).compile()
    return lambda: jax.block_until_ready(compiled(theta, *batch))


def outputs(p: Parameters, x: Array) -> Array:
    """The network on samples ``(n, *shape)``: which one, its parameters tell."""
    if x.ndim == 2:
        for layer in ("body.1", "body.3"):
            x = jax.nn.relu(x @ p[f"{layer}.weight"].T + p[f"{layer}.bias"])
        return x @ p["head.weight"].T + p["head.bias"]
    pooled = "body.4.weight" in p  # a block has a fourth layer then
    x = x.transpose(0, 2, 3, 1)
    for block in range(4):
        first = block * (4 if pooled else 3)
        x = convolution(x, p[f"body.{first}.weight"], 1 if pooled else 2)
        x = jax.nn.relu(standardised(x) + p[f"body.{first + 1}.bias"])
        if pooled:
            x = max_pool(x)
    x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
    return x @ p["head.weight"].T + p["head.bias"]


def convolution(x: Array, weight: Array, stride: int) -> Array:
    """3x3 with a border of one zero: ``(n, h, w, c)`` to ``(n, h', w', out)``."""
    n, height, width, channels = x.shape
    rows, columns = -(-height // stride), -(-width // stride)
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = [
        x[:, i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (columns - 1) + 1 : stride]
        for i in range(3)
        for j in range(3)
    ]
    patches = jnp.concatenate(windows, axis=3).reshape(-1, 9 * channels)
    kernel = weight.transpose(2, 3, 1, 0).reshape(9 * channels, -1)
    return (patches @ kernel).reshape(n, rows, columns, -1)


def standardised(x: Array) -> Array:
    """Less the batch's mean, over its standard deviation, a channel."""
    mean = x.mean((0, 1, 2))
    variance = jnp.square(x - mean).mean((0, 1, 2))
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5)


def max_pool(x: Array) -> Array:
    """2x2, what is left over dropped."""
    n, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).max((2, 4))


def loss_of(found: Array, targets: Array) -> Array:
    """Mean cross-entropy for integer targets, mean squared error for others."""
    if jnp.issubdtype(targets.dtype, jnp.floating):
        return jnp.square(found - targets).mean()
    return -jnp.take_along_axis(jax.nn.log_softmax(found), targets[:, None], 1).mean()
