"""Run by ``torchrun``: meta-gradients of one batch, shared by the processes, to a file."""

import importlib
import sys
from pathlib import Path

import torch

import algorithms
from bench.distributed import join
from tests.algorithms import derivation

target, *cases = sys.argv[1:]
team = join()
importlib.import_module("torch.distributed.nn")  # as torch does by itself at some time
assert team.agrees("the same")
assert team.agrees(f"{team.rank}") == (team.size == 1)
found = {}
for case in cases:
    name, norm = case.split("-")
    torch.manual_seed(1)
    model = derivation.Net().double()
    settings = {"inner_lr": 0.3, "inner_steps": 2, "norm": norm}
    if name == "reptile":
        settings |= {"inner_optimizer": "adam", "inner_lr": 0.03, "keep_moments": True}
    algorithm = algorithms.create(name, model, inner_batch=4, **settings)
    batch = derivation.make_batch(tasks=5)
    mine = list(team.part(range(5)))
    algorithm.task_seeds = mine
    algorithm.meta_backward({half: [part[mine] for part in pair] for half, pair in batch.items()})
    team.average(algorithm, len(mine) / 5)
    gradients = {name: value.grad for name, value in model.named_parameters()}
    found[case] = gradients | dict(model.named_buffers()) | algorithm.carried
if team.rank == 0:
    torch.save(found, target)
team.dismiss()
# A thread of the group that is there when Python ends may abort the process.
threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
assert not [name for name in threads if "gloo" in name]
