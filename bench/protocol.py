"""Episodic evaluation, the same for every algorithm: the same episodes, adapted and scored."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from algorithms import Algorithm, Scores
from bench.checkpoints import due, read_tensors, write_tensors
from bench.distributed import ALONE, Team
from bench.errors import CellError
from datasets import EpisodeSpec, Source

BATCH = 20
"""Episodes at a time: it bounds memory, and cannot change a score."""


@dataclass(frozen=True)
class Kept:
    """Where an evaluation keeps the scores it has, to go on from when it is interrupted.

    Attributes:
        path: the file.
        notes: whose scores they are; those of others are not gone on from.
        interrupted: asked now and then; True ends in ``KeyboardInterrupt``.
    """

    path: Path
    notes: Mapping[str, str]
    interrupted: Callable[[], bool]

    def write(self, parts: Sequence[Scores]) -> None:
        write_tensors(vars(Scores.merged(parts)), self.path, **self.notes)

    def read(self) -> list[Scores]:
        """What was kept; what cannot be read counts as nothing."""
        try:
            return [Scores(**read_tensors(self.path, **self.notes))]
        except (OSError, ValueError):
            return []


def evaluate(
    algorithm: Algorithm,
    source: Source,
    spec: EpisodeSpec,
    episodes: int,
    steps: int,
    advanced: Callable[[int], None] = lambda done: None,
    team: Team = ALONE,
    kept: Kept | None = None,
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
        kept: where one process keeps scores on the way; a team does not.

    Returns:
        One row an episode and step, with columns ``episode``, ``step`` (0, 1, ... steps), ``loss``
        and ``metric``.

    Raises:
        CellError: a loss that is not finite after the last step.
    """
    parts = [Scores(torch.empty(0, steps + 1), torch.empty(0, steps + 1))]
    parts += kept.read() if kept else []
    mine, saved = team.part(range(episodes)), time.monotonic()
    for first in range(sum(len(part.loss) for part in parts), len(mine), BATCH):
        indices = mine[first : first + BATCH]
        part = algorithm.evaluate(source.batch(spec, indices), steps)
        parts.append(Scores(part.loss.cpu(), part.metric.cpu()))
        advanced(min((first + len(indices)) * team.size, episodes))
        if kept is None:
            continue
        stop = kept.interrupted()
        if stop or due(saved):
            kept.write(parts)
            saved = time.monotonic()
        if stop:
            raise KeyboardInterrupt
    scores = Scores.merged(parts)
    loss, metric = team.joined(scores.loss), team.joined(scores.metric)
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
