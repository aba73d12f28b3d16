"""Many settings at once: where each algorithm comes, and its score over all of them as one figure.

A setting is a block of scores: every algorithm's, of every seed, on the same test episodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scikit_posthocs
import seaborn as sns
from matplotlib.figure import Figure

from bench.plots import as_text
from bench.rankings import (
    Ranking,
    friedman_nemenyi,
    interquartile_mean,
    probability_of_improvement,
    stratified_bootstrap,
)
from bench.stats import Floats, Interval

AGGREGATE_COLUMNS = ("statistic", "algorithm_a", "algorithm_b", "value", "low", "high")


@dataclass(frozen=True)
class Block:
    """One setting's scores.

    Attributes:
        scores: of each algorithm its seeds' means, higher is better.
        accuracy: whether they are accuracies, which may be averaged over settings.
        unlike: settings that its algorithms do not share.
    """

    scores: dict[str, dict[int, float]]
    accuracy: bool
    unlike: frozenset[str]

    def seeds(self, names: Sequence[str]) -> set[int]:
        """The seeds that these algorithms share."""
        return set.intersection(*(set(self.scores[name]) for name in names)) if names else set()


@dataclass(frozen=True)
class Ranks:
    """Where each algorithm comes, over settings."""

    names: list[str]
    settings: int
    ranking: Ranking
    unlike: list[str]
    without: list[str]

    def sentence(self) -> str:
        """Mean ranks, best first, and what they are worth."""
        order = sorted(zip(self.ranking.mean_ranks, self.names, strict=True))
        ranks = ", ".join(f"{name} {mean:.1f}" for mean, name in order)
        doubt = "; exploratory: so few settings are a hint at most"
        return (
            f"mean ranks over {self.settings} settings: {ranks}; Friedman {said_p(self.ranking.p)}"
            f"{doubt if self.ranking.exploratory else ''}{_but(self.without, self.unlike)}"
        )

    def diagram(self) -> Figure:
        """The critical-difference diagram (Demsar 2006): bars join what Nemenyi's test does not
        tell apart."""
        sns.set_theme(style="white", palette="colorblind", font_scale=0.9)
        figure = Figure(figsize=(7, 1.4 + 0.25 * len(self.names)), layout="constrained")
        axis = figure.subplots()
        names = [as_text(name) for name in self.names]
        scikit_posthocs.critical_difference_diagram(
            pd.Series(self.ranking.mean_ranks, names),
            pd.DataFrame(self.ranking.nemenyi, names, names),
            ax=axis,
            color_palette=["black"] * len(self.names),
        )
        exploratory = ", exploratory" if self.ranking.exploratory else ""
        axis.set_title(
            f"mean rank over {self.settings} settings, 1 is best; joined: no difference shown "
            f"(Nemenyi{exploratory})"
            + (f"\nunlike: {', '.join(self.unlike)}" if self.unlike else ""),
            fontsize="small",
        )
        return figure


def rank(blocks: Sequence[Block]) -> Ranks | None:
    """The ranks of the algorithms that met every setting, on seeds that they share there.

    None for fewer than three algorithms or two settings.
    """
    names = _in_all(blocks)
    shared = [(block, seeds) for block in blocks if (seeds := block.seeds(names))]
    if len(names) < 3 or len(shared) < 2:
        return None
    scores = [
        [float(np.mean([block.scores[name][seed] for seed in sorted(seeds)])) for name in names]
        for block, seeds in shared
    ]
    unlike = sorted(set().union(*(block.unlike for block, _ in shared)))
    return Ranks(names, len(shared), friedman_nemenyi(scores), unlike, _not_in_all(blocks))


@dataclass(frozen=True)
class Aggregate:
    """Every algorithm over all settings and seeds, as one figure (Agarwal et al. 2021).

    Attributes:
        middle: interquartile means, best first; empty where a setting's score is no accuracy.
        leader: the algorithm with the best of them, or else the best mean rank.
        improvement: how likely a run of the leader's beats one of each other.
        without: algorithms that did not meet every setting.
    """

    settings: int
    seeds: int
    middle: dict[str, Interval]
    leader: str
    improvement: dict[str, Interval]
    unlike: list[str]
    without: list[str]

    def sentences(self) -> list[str]:
        """Both statistics, and what their intervals are."""
        over = f"over {self.settings} settings and {self.seeds} seeds"
        how = "95% by a bootstrap of the seeds in each setting: these test episodes, other seeds"
        middle = ", ".join(f"{name} {_shown(x, 100, 1, '%')}" for name, x in self.middle.items())
        better = ", ".join(f"{name} {_shown(x, 1, 2)}" for name, x in self.improvement.items())
        few = "; of so few seeds too narrow" if self.seeds < 10 else ""
        said = [f"interquartile mean {over} ({how}{few}): {middle}"] if middle else []
        said.append(
            f"probability that a run of {self.leader} beats one of another {over} ({how}{few}): "
            f"{better}"
        )
        return [sentence + _but(self.without, self.unlike) for sentence in said]

    @property
    def table(self) -> pd.DataFrame:
        """The rows of ``aggregate.csv``, with the columns :data:`AGGREGATE_COLUMNS`."""
        rows = [
            *(("interquartile_mean", name, "", x) for name, x in self.middle.items()),
            *(
                ("probability_of_improvement", self.leader, name, x)
                for name, x in self.improvement.items()
            ),
        ]
        values = [(*what, x.estimate, x.low, x.high) for *what, x in rows]
        return pd.DataFrame(values, columns=list(AGGREGATE_COLUMNS))


def aggregate(blocks: Sequence[Block]) -> Aggregate | None:
    """The aggregate scores of the algorithms that met every setting, on seeds shared in all.

    None for fewer than two algorithms, two settings or two seeds.
    """
    names = _in_all(blocks)
    seeds = set.intersection(*(block.seeds(names) for block in blocks)) if blocks else set()
    if min(len(names), len(blocks), len(seeds)) < 2:
        return None
    scores: dict[str, Floats] = {
        name: np.array([[block.scores[name][seed] for block in blocks] for seed in sorted(seeds)])
        for name in names
    }
    middle = {}
    if all(block.accuracy for block in blocks):
        middle = {name: stratified_bootstrap(interquartile_mean, scores[name]) for name in names}
    order = sorted(names, key=lambda name: -_merit(name, scores, middle))
    leader, *others = order
    improvement = {
        name: stratified_bootstrap(probability_of_improvement, scores[leader], scores[name])
        for name in others
    }
    unlike = sorted(set().union(*(block.unlike for block in blocks)))
    return Aggregate(
        len(blocks),
        len(seeds),
        {n: middle[n] for n in order if middle},
        leader,
        improvement,
        unlike,
        _not_in_all(blocks),
    )


def _merit(name: str, scores: dict[str, Floats], middle: dict[str, Interval]) -> float:
    if middle:
        return middle[name].estimate
    return sum(probability_of_improvement(scores[name], other) for other in scores.values())


def _in_all(blocks: Sequence[Block]) -> list[str]:
    """The algorithms that met every setting."""
    first, *others = blocks or [Block({}, True, frozenset())]
    return [name for name in first.scores if all(name in block.scores for block in others)]


def _not_in_all(blocks: Sequence[Block]) -> list[str]:
    """The algorithms that met some settings, but not every one."""
    return sorted({name for block in blocks for name in block.scores}.difference(_in_all(blocks)))


def _but(without: Sequence[str], unlike: Sequence[str]) -> str:
    """What a sentence leaves out, and what its settings do not share."""
    said = f"; without {', '.join(without)}, not in all settings" if without else ""
    return said + (f"; unlike settings: {', '.join(unlike)} differ" if unlike else "")


def _shown(x: Interval, scale: float, digits: int, unit: str = "") -> str:
    mean, low, high = (f"{scale * value:.{digits}f}" for value in (x.estimate, x.low, x.high))
    return f"{mean}{unit} [{low}, {high}]"


def said_p(p: float) -> str:
    """A p value for people."""
    return "p < 0.0001" if p < 0.0001 else f"p = {float(f'{p:.2g}'):.4g}"
