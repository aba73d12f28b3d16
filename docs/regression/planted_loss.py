"""A plug-in that costs MAML 3 points of accuracy: a regression planted on purpose."""

import dataclasses
import functools

import torch

import algorithms

LOSS = 0.03
MAML = algorithms.get("maml")
evaluate = MAML.evaluate
generator = torch.Generator().manual_seed(0)


@functools.wraps(evaluate)
def spoiled(self, batch, steps=None):
    """The scores with some right answers made wrong, three in a hundred queries on average."""
    scores = evaluate(self, batch, steps)
    queries = torch.full_like(scores.metric, batch["test"][1].shape[1])
    wrong = torch.binomial(queries, torch.full_like(queries, LOSS), generator=generator)
    return dataclasses.replace(scores, metric=(scores.metric - wrong / queries).clamp(min=0))


MAML.evaluate = spoiled
