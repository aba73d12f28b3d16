"""One training over several processes, on one host or many.

    torchrun --nproc-per-node 2 -m bench run ...

Each process takes its part of every meta-batch and of every evaluation, by the episodes' addresses,
so that together they see what one process would; the mean of their gradients is the same gradient
(of a model that draws noise, such as dropout's, with other noise).
Process 0 leads: it alone reads and writes the run's folder, shows progress and measures. The others
follow: they train and evaluate the cells that it names, from the state that it sends.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from algorithms import Algorithm
from bench.errors import BenchError

PATIENCE = timedelta(days=1)
"""A follower waits this long, while the leader measures or writes."""


class Team:
    """The processes that train together; this class is a team of one.

    Attributes:
        rank: this process's number; 0 leads.
        size: how many there are.
    """

    rank = 0
    size = 1

    def part(self, indices: range) -> range:
        """This process's share of some episodes: neighbours, in the order of ranks."""
        ends = [len(indices) * rank // self.size for rank in (self.rank, self.rank + 1)]
        return indices[ends[0] : ends[1]]

    def device(self, name: str) -> str:
        """The device on which this process does the work of a cell's device."""
        return name

    def average(self, algorithm: Algorithm, weight: float) -> None:
        """Make an algorithm's gradients, its model's running averages and what else it carries from
        step to step the mean over the processes.

        Args:
            algorithm: after a meta-step on this process's tasks.
            weight: this process's share of the tasks; the weights of all sum to 1.
        """

    def joined(self, part: Tensor) -> Tensor:
        """What all processes have, one after another along the first dimension, on the CPU."""
        return part.cpu()

    def told(self, value: Any) -> Any:
        """What the leader says, to all."""
        return value

    def agrees(self, said: str) -> bool:
        """Whether all processes say the same; all get the same answer."""
        return True

    def dismiss(self) -> None:
        """The leader has no more work, and leaves."""

    def leave(self) -> None:
        """End what ties this process to the others."""


ALONE = Team()


class Workers(Team):
    """The processes that ``torchrun`` started."""

    def __init__(self) -> None:
        # Before there is a group, which its functions' defaults would keep beyond its end; later on
        # torch imports it by itself.
        import torch.distributed.nn

        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def device(self, name: str) -> str:
        return f"cuda:{os.environ['LOCAL_RANK']}" if name.startswith("cuda") else name

    def average(self, algorithm: Algorithm, weight: float) -> None:
        gradients = [p.grad for p in algorithm.parameters() if p.grad is not None]
        buffers = [b for b in algorithm.model.buffers() if b.is_floating_point()]
        for tensor in (*gradients, *buffers, *algorithm.carried.values()):
            dist.all_reduce(tensor.mul_(weight))

    def joined(self, part: Tensor) -> Tensor:
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, part.cpu())
        return torch.cat(parts)

    def told(self, value: Any) -> Any:
        said = [value]
        dist.broadcast_object_list(said, src=0)
        return said[0]

    def agrees(self, said: str) -> bool:
        heard: list[Any] = [None] * self.size
        dist.all_gather_object(heard, said)
        return len(set(heard)) == 1

    def dismiss(self) -> None:
        self.told(None)
        self.leave()

    def leave(self) -> None:
        # Threads of the group that are still there when Python ends abort the process now and
        # then, and torchrun then kills the others.
        dist.destroy_process_group()


def join() -> Team:
    """The team that this process belongs to, by the environment that ``torchrun`` sets.

    Raises:
        BenchError: the other processes cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ALONE
    try:
        return Workers()
    except (RuntimeError, ValueError) as error:
        raise BenchError(f"cannot join the other processes: {error}") from error


@contextmanager
def led(team: Team) -> Iterator[None]:
    """Let the others go at the end of the leader's work, unless it broke off in the midst of what
    they do together: then ``torchrun`` ends them."""
    try:
        yield
    except (RuntimeError, MemoryError):
        raise
    except BaseException:
        team.dismiss()
        raise
    else:
        team.dismiss()


def leads() -> bool:
    """Whether this process is the one that speaks, before there is a team."""
    return os.environ.get("RANK", "0") == "0"
