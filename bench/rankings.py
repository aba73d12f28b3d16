"""Many algorithms, or many settings, at once: corrections, ranks and aggregate scores.

Pure functions of arrays, as `bench.stats`. Higher scores are better: negate an error. A block or a
task is a dataset or a setting (5-way 1-shot), never an episode.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scikit_posthocs import posthoc_nemenyi_friedman
from scipy import stats

from bench.stats import Floats, Interval, finite, inside_unit

FEWEST_BLOCKS = 8


@dataclass(frozen=True)
class Ranking:
    """Friedman's test that k algorithms are alike, and Nemenyi's for each pair of them."""

    statistic: float  # Friedman's chi squared, corrected for ties
    p: float
    mean_ranks: Floats  # (k,), 1 is best
    nemenyi: Floats  # (k, k) p values, already adjusted for the number of pairs
    exploratory: bool  # too few blocks for the p values to be more than a hint


def holm(p_values: npt.ArrayLike) -> Floats:
    """P values (m,) adjusted for a family of m tests, in the same order (Holm 1979).

    Reject where the adjusted value is below alpha: the chance of any false rejection is then at
    most alpha. The family is to be named before its results are seen. The tests hold this against
    statsmodels' `multipletests`, which spends half a second a call in collecting garbage.
    """
    p = finite(p_values, "p_values")
    if p.min() < 0 or p.max() > 1:
        raise ValueError("p_values are not all from 0 to 1")
    order = np.argsort(p)
    stepwise = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = stepwise.clip(max=1)
    return adjusted


def friedman_nemenyi(scores: npt.ArrayLike) -> Ranking:
    """Ranks of k >= 3 algorithms over n >= 2 blocks, `scores` (n, k) (Demsar 2006).

    https://jmlr.org/papers/v7/demsar06a.html. `exploratory` is set under 8 blocks, where the
    chi-squared approximation is poor and Nemenyi's test finds little.
    """
    x = finite(scores, "scores", 2)
    blocks, algorithms = x.shape
    if blocks < 2 or algorithms < 3:
        raise ValueError(f"{blocks} blocks of {algorithms} algorithms: at least 2 of 3 are needed")
    statistic, p = 0.0, 1.0
    if np.ptp(x, axis=1).any():  # all tied is no difference, where the correction for ties is 0 / 0
        test = stats.friedmanchisquare(*x.T)
        statistic, p = float(test.statistic), float(test.pvalue)
    return Ranking(
        statistic,
        p,
        mean_ranks=stats.rankdata(-x, axis=1).mean(axis=0),
        nemenyi=posthoc_nemenyi_friedman(x).to_numpy(dtype=np.float64),
        exploratory=blocks < FEWEST_BLOCKS,
    )


def interquartile_mean(scores: npt.ArrayLike) -> float:
    """Mean of the middle half of all scores (seeds, tasks) (Agarwal et al. 2021, section 4.3).

    https://arxiv.org/abs/2108.13264. Seeds and tasks are pooled: a quarter of them, rounded down,
    is cut from either end.
    """
    ordered = np.sort(finite(scores, "scores", 2), axis=None)
    cut = ordered.size // 4
    return float(ordered[cut : ordered.size - cut].mean())


def probability_of_improvement(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """How likely a run of a beats a run of b on a task drawn at random, a tie counting half.

    `a` (seeds, tasks) and `b` (other seeds, the same tasks): the Mann-Whitney statistic over the
    number of pairs, averaged over tasks (Agarwal et al. 2021, section 4.3).
    """
    x, y = finite(a, "a", 2), finite(b, "b", 2)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"a has {x.shape[1]} tasks and b {y.shape[1]}")
    return float((np.sign(x[:, None] - y[None]).mean() + 1) / 2)


def stratified_bootstrap(
    statistic: Callable[..., float],
    *scores: npt.ArrayLike,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """`statistic(*scores)` with its percentile bootstrap interval over seeds.

    Each array of `scores` (seeds, tasks) has its seeds redrawn within each task, as if every cell
    had been trained apart (Agarwal et al. 2021, section 4.1). With few seeds it is too narrow: over
    6 tasks, 95% intervals of a mean cover about 88% of the time with 5 seeds, 95% with 10. It is
    for a glance over many tasks; one comparison is `bench.stats.hierarchical_difference`. With one
    seed the bounds are NaN. Raises ValueError without scores.
    """
    arrays = [finite(x, f"scores {i}", 2) for i, x in enumerate(scores, start=1)]
    if not arrays:
        raise ValueError("there are no scores")
    inside_unit(confidence, "confidence")
    seeds = min(len(x) for x in arrays)
    low = high = math.nan
    if seeds > 1:
        generator = np.random.default_rng(seed)
        draws = [
            statistic(*(_redrawn_within_tasks(x, generator) for x in arrays))
            for _ in range(resamples)
        ]
        low, high = map(float, np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2]))
    return Interval(statistic(*arrays), low, high, seeds, "seeds", confidence)


def _redrawn_within_tasks(x: Floats, generator: np.random.Generator) -> Floats:
    return np.take_along_axis(x, generator.integers(0, len(x), size=x.shape), axis=0)
