"""Episodic evaluation, the same for every algorithm: the same episodes, adapted and scored."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch

from algorithms import Algorithm, Scores
from bench.distributed import ALONE, Team
from bench.errors import CellError
from datasets import EpisodeSpec, Source

BATCH = 20
"""Episodes at a time: it bounds memory, and cannot change a score."""


def evaluate(
    algorithm: Algorithm,
    source: Source,
    spec: EpisodeSpec,
    episodes: int,
    steps: int,
    advanced: Callable[[int], None] = lambda done: None,
    team: Team = ALONE,
) -> pd.DataFrame:
    """Score an algorithm on the first ``episodes`` episodes of a stream.

    Args:
        algorithm: what is scored; nothing it has learned changes.
        source: the split.
        spec: the shape of the episodes, and their stream.
        episodes: how many.
        steps: inner steps.
        advanced: is told how many episodes are done.
        team: the processes that share the episodes; each gets all the scores.

    Returns:
        One row an episode and step, with columns ``episode``, ``step`` (0, 1, ... steps), ``loss``
        and ``metric``.

    Raises:
        CellError: a loss that is not finite after the last step.
    """
    parts = [Scores(torch.empty(0, steps + 1), torch.empty(0, steps + 1))]
    mine = team.part(range(episodes))
    for first in range(0, len(mine), BATCH):
        indices = mine[first : first + BATCH]
        part = algorithm.evaluate(source.batch(spec, indices), steps)
        parts.append(Scores(part.loss.cpu(), part.metric.cpu()))
        advanced(min((first + len(indices)) * team.size, episodes))
    loss = team.joined(torch.cat([part.loss for part in parts]))
    metric = team.joined(torch.cat([part.metric for part in parts]))
    if not bool(loss[:, -1].isfinite().all()):
        episode = int((~loss[:, -1].isfinite()).nonzero()[0])
        raise CellError(f"the loss is not finite after adapting to episode {episode} of {spec}")
    return pd.DataFrame(
        {
            "episode": torch.arange(episodes).repeat_interleave(steps + 1).numpy(),
            "step": torch.arange(steps + 1).repeat(episodes).numpy(),
            "loss": loss.flatten().double().numpy(),
            "metric": metric.flatten().double().numpy(),
        }
    )


def after_last_step(scores: pd.DataFrame) -> pd.Series[float]:
    """The metric of each episode after its last inner step, in the order of episodes."""
    last = scores[scores["step"] == scores["step"].max()]
    metric: pd.Series[float] = last.set_index("episode")["metric"].sort_index()
    return metric
