"""What the scores of one or two algorithms show: intervals, paired tests, margins, resolution.

Everything here is a pure function of arrays. An interval says in `over` what it speaks of:

    "episodes"  this trained model, on new tasks drawn from the same test classes
    "seeds"     this algorithm, trained again (and met with new tasks)
    "classes"   this trained model, on tasks drawn from new test classes
    "repeats"   this program on this machine, measured again

Accuracies are fractions (0.981, not 98.1). Tables call an interval's half width `ci95`. Bad input
(empty, wrong shape, NaN or infinite) raises ValueError with one line. Tests over several
algorithms or settings at once are in `bench.rankings`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import special

Floats = npt.NDArray[np.float64]
Over = Literal["episodes", "seeds", "classes", "repeats"]


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval, in the units of the values it was made from."""

    estimate: float
    low: float
    high: float
    n: int  # how many of what `over` names
    over: Over
    confidence: float = 0.95

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Difference:
    """A minus b, with the p value that belongs to the interval (below 0.05 where it excludes 0).

    `effect` is Cohen's d_z: the mean difference in standard deviations of one difference.
    """

    interval: Interval
    p: float
    effect: float
    seeds: int
    episodes: int


@dataclass(frozen=True)
class PairedDifference(Difference):
    """A difference of two trained models; two tests with fewer assumptions beside the t test."""

    p_wilcoxon: float
    p_permutation: float


@dataclass(frozen=True)
class MarginTest:
    """A test that a loss of a margin is ruled out; `passed` where p is below its alpha.

    The interval is the two-sided one of level 1 - 2 alpha, which agrees with the verdict: passed
    exactly where the bound that is tested is inside the margin.
    """

    interval: Interval
    margin: float
    p: float
    passed: bool


def finite(values: npt.ArrayLike, name: str, dimensions: int = 1) -> Floats:
    """`values` as a float64 array; ValueError unless it has these dimensions and finite elements.

    Raises ValueError too where it is empty.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != dimensions:
        raise ValueError(f"{name} has {array.ndim} dimensions, not {dimensions}")
    if array.size == 0:
        raise ValueError(f"{name} is empty")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return array


def inside_unit(value: float, name: str) -> float:
    """`value`; ValueError unless it lies strictly between 0 and 1."""
    if not 0 < value < 1:
        raise ValueError(f"{name} is {value}, not between 0 and 1")
    return value


# One sample


def mean_interval(
    values: npt.ArrayLike, confidence: float = 0.95, over: Over = "episodes"
) -> Interval:
    """The mean of `values` (n,) with Student's t interval (standard deviation with ddof 1).

    One value has an estimate and no interval: its bounds are NaN.
    """
    x = finite(values, "values")
    inside_unit(confidence, "confidence")
    mean = float(x.mean())
    half = _t_quantile(1 - confidence, x.size - 1) * _standard_error(x)
    return Interval(mean, mean - half, mean + half, x.size, over, confidence)


def binomial_floor(accuracy: float, queries: int, episodes: int, confidence: float = 0.95) -> float:
    """Half width of the interval of a mean accuracy if all answers were independent coin tosses.

    `accuracy` is the mean over `episodes` episodes of `queries` queries each. Tasks differ in
    difficulty and queries of one task share a model, both of which widen an interval: a much
    narrower one is a sign of a mistake, such as a standard error taken over queries.
    """
    if not 0 <= accuracy <= 1:
        raise ValueError(f"accuracy is {accuracy}, not a fraction from 0 to 1")
    if queries < 1 or episodes < 1:
        raise ValueError(f"queries and episodes are {queries} and {episodes}, not both positive")
    inside_unit(confidence, "confidence")
    error = math.sqrt(accuracy * (1 - accuracy) / (queries * episodes))
    return _t_quantile(1 - confidence, episodes - 1) * error


def below_floor(interval: Interval, queries: int) -> bool:
    """Whether an interval over episodes of accuracy is too narrow to be believed.

    True where its standard deviation is under `binomial_floor`'s by more than chance gives once in
    1,000 times (chi-squared). A model that answers with one label whatever it is shown is right in
    exactly 1 / ways of every episode, and so falls below as well.
    """
    if interval.n < 2:
        return False
    floor = binomial_floor(interval.estimate, queries, interval.n, interval.confidence)
    freedom = interval.n - 1
    slack = math.sqrt(float(special.chdtri(freedom, 0.999)) / freedom)
    return interval.half_width < slack * floor


def class_interval(
    values: npt.ArrayLike, classes: npt.ArrayLike, confidence: float = 0.95
) -> Interval:
    """The mean of `values` (episodes,) with an interval for tasks from new test classes.

    `classes` (episodes, ways), integers: the classes of each episode. Thousands of episodes may
    stand on twenty classes, and an interval over episodes, which takes those classes as given,
    understates what is unknown about new data (Lafargue et al. 2024, arXiv 2409.02850). The values
    may be differences of two algorithms.

    Two episodes that share classes have similar values. The covariance a shared class adds is the
    slope of the products of two episodes' deviations on the number of classes they share (Haseman
    and Elston 1972, https://doi.org/10.1007/BF01066731), and

        variance of the mean = variance / episodes + slope * mean number of classes shared,

    the second term with classes - 1 degrees of freedom. One standard error of the slope is added to
    it, without which the interval is too narrow where the slope is hard to tell from noise. The
    obvious bootstrap, which weighs an episode by how often its classes were redrawn, fails: by the
    product of these counts nine in ten 5-way episodes weigh nothing, and the interval is several
    times too wide; by their mean, the classes' share of it is too narrow by the number of ways.

    Raises ValueError where the classes tell nothing: an episode names a class twice, or every two
    episodes share equally many.
    """
    x = finite(values, "values")
    labels = np.asarray(classes)
    if labels.ndim != 2 or labels.shape[0] != x.size or labels.dtype.kind not in "iu":
        raise ValueError(f"classes is not an integer array of shape ({x.size}, ways)")
    if (np.diff(np.sort(labels, axis=1), axis=1) == 0).any():
        raise ValueError("an episode names a class twice")
    inside_unit(confidence, "confidence")

    episodes, ways = labels.shape
    known, members = np.unique(labels, return_inverse=True)
    members = members.reshape(labels.shape)
    deviation = x - x.mean()
    squares = float(deviation @ deviation)

    # Sums over the ordered pairs of different episodes, from sums over classes.
    pairs = episodes * (episodes - 1)
    together = np.bincount((members[:, :, None] * known.size + members[:, None, :]).ravel())
    shared = float((np.bincount(members.ravel()) ** 2).sum()) - episodes * ways
    shared_squared = float((together**2).sum()) - episodes * ways**2
    of_class = np.bincount(members.ravel(), weights=np.repeat(deviation, ways))
    shared_products = float(of_class @ of_class) - ways * squares
    spread = shared_squared - shared**2 / pairs if pairs else 0.0
    if spread <= 1e-9 * shared_squared:
        raise ValueError("every two episodes share equally many classes: none can be told apart")

    slope = (shared_products + shared * squares / pairs) / spread
    variance = squares / (episodes - 1)
    slope_error = variance * math.sqrt(2 / spread)
    from_classes = (max(slope, 0.0) + slope_error) * shared / pairs
    mean = float(x.mean())
    half = math.hypot(
        _t_quantile(1 - confidence, known.size - 1) * math.sqrt(from_classes),
        _t_quantile(1 - confidence, episodes - 1) * math.sqrt(variance / episodes),
    )
    return Interval(mean, mean - half, mean + half, known.size, "classes", confidence)


# Two algorithms on the same episodes


def paired_difference(
    a: npt.ArrayLike, b: npt.ArrayLike, confidence: float = 0.95, seed: int = 0
) -> PairedDifference:
    """Mean of a - b, both (episodes,) on the same episodes: two trained models, on new tasks.

    The interval and `p` are Student's paired t. `p_wilcoxon` is the signed-rank test (Wilcoxon
    1945; zero differences are dropped), `p_permutation` the test of the mean that flips signs at
    random. Where no episode differs every p value is 1. One episode gives NaN bounds.
    """
    d = _differences(a, b, 1)
    # Scores come from float32, in which equal differences of unequal scores are not quite equal.
    grain = 2.0**-20 * max(float(np.abs(x).max()) for x in (a, b))
    interval = mean_interval(d, confidence)
    deviation = _standard_error(d) * math.sqrt(d.size)
    t = _quotient(interval.estimate, _standard_error(d))
    return PairedDifference(
        interval,
        p=2 * _t_tail(abs(t), d.size - 1),
        effect=_quotient(interval.estimate, deviation),
        seeds=1,
        episodes=d.size,
        p_wilcoxon=_wilcoxon_p(d, grain),
        p_permutation=_sign_flip_p(d, grain, seed),
    )


def _wilcoxon_p(d: Floats, grain: float) -> float:
    """Of the signed ranks of d (n,), those that are apart by less than the grain ranked as ties."""
    from scipy import stats  # half a second, which every process of a run would wait for

    steps = np.round(d / grain) if grain else d
    return float(stats.wilcoxon(steps).pvalue) if steps.any() else 1.0


def hierarchical_difference(
    a: npt.ArrayLike, b: npt.ArrayLike, confidence: float = 0.95
) -> Difference:
    """Mean of a - b, both (seeds, episodes): two algorithms, trained again and met with new tasks.

    All seeds of both algorithms meet the same episodes, so seeds and episodes are crossed, not
    nested: a hard episode is hard for every seed, and more seeds do not average it out. Row s of
    a and of b are paired, for the seed decides initialisation and training episodes of both in the
    same way; were the rows unrelated, their differences would still be an unbiased sample.

    For the differences d[s, e] = mean + seed + episode + residual the squared half width is

        t(seeds - 1)^2 * variance of the seeds' means / seeds
        + t(episodes - 1)^2 * what the shared episodes add to that variance,

    each source with its own t quantile (recovered variances: Zou and Donner 2008,
    https://doi.org/10.1002/sim.3095; variance components: Searle, Casella and McCulloch 1992,
    chapter 4). The first term alone is the t interval over seeds, which speaks of these episodes
    only. This takes the place of a bootstrap over seeds, then episodes: a handful of seeds
    resampled spread too little, and where seeds are three quarters of the variance, five seeds'
    95% intervals cover 83% of the time (episodes redrawn within each seed) or 89% (once for all
    seeds). It holds for two seeds as well, at the price of width (the t factor is 12.7; 4.3 for
    three); where seeds hardly differ it is then wider than it need be.

    Raises ValueError for fewer than two seeds or two episodes: one seed is `paired_difference`.
    """
    d = _differences(a, b, 2)
    inside_unit(confidence, "confidence")
    spread = _crossed(d)
    mean = float(d.mean())
    half = spread.wide(spread.seeds, lambda n: _t_quantile(1 - confidence, n))
    return Difference(
        Interval(mean, mean - half, mean + half, spread.seeds, "seeds", confidence),
        p=_level_where(
            lambda alpha: spread.wide(spread.seeds, lambda n: _t_quantile(alpha, n)) - abs(mean)
        ),
        effect=_quotient(mean, math.sqrt(spread.of_one)),
        seeds=spread.seeds,
        episodes=spread.episodes,
    )


@dataclass(frozen=True)
class _Crossed:
    """What seeds and episodes, crossed, add to the variance of the mean of a table of both.

    Attributes:
        from_seeds, from_episodes: the two shares.
        of_one: the variance of one element.
    """

    seeds: int
    episodes: int
    from_seeds: float
    from_episodes: float
    of_one: float

    def wide(self, seeds: int, factor: Callable[[int], float]) -> float:
        """Both shares' standard errors, each times `factor` of its degrees of freedom, together;
        with so many seeds in place of those there are."""
        return math.hypot(
            factor(seeds - 1) * math.sqrt(self.from_seeds * self.seeds / seeds),
            factor(self.episodes - 1) * math.sqrt(self.from_episodes),
        )


def _crossed(d: Floats) -> _Crossed:
    """The variance components of d (seeds, episodes)."""
    seeds, episodes = d.shape
    if seeds < 2 or episodes < 2:
        raise ValueError(f"{seeds} seeds of {episodes} episodes: at least 2 of each are needed")
    of_seed, of_episode = d.mean(axis=1), d.mean(axis=0)
    residual = d - of_seed[:, None] - of_episode + float(d.mean())
    noise = float((residual**2).sum()) / ((seeds - 1) * (episodes - 1))
    from_seeds = float(of_seed.var(ddof=1)) / seeds
    if from_seeds <= 1e-9 * noise / d.size:
        # Scores lie on a lattice, and few seeds' means can coincide: no less than what the episodes
        # they do not share make of it.
        from_seeds = noise / d.size
    from_episodes = max(float(of_episode.var(ddof=1)) / episodes - noise / d.size, 0.0)
    of_one = max(seeds * from_seeds - noise / episodes, 0.0) + episodes * from_episodes + noise
    return _Crossed(seeds, episodes, from_seeds, from_episodes, of_one)


def resolvable_difference(
    differences: npt.ArrayLike, power: float = 0.8, alpha: float = 0.05
) -> float:
    """The smallest true mean difference a two-sided t test on so many episodes finds.

    `differences` (episodes,), at least two, give their number and spread; "finds" means with
    probability `power`: so many standard errors as the noncentral t distribution has to be shifted
    by to leave its critical value behind with that probability.
    """
    d = finite(differences, "differences")
    return _resolvable(_deviation(d), d.size, power, alpha)


def episodes_to_resolve(
    differences: npt.ArrayLike, target: float, power: float = 0.8, alpha: float = 0.05
) -> int:
    """The fewest episodes whose `resolvable_difference` is at most `target` (in the same units)."""
    deviation = _deviation(finite(differences, "differences"))
    return _fewest(lambda episodes: _resolvable(deviation, episodes, power, alpha), target)


def resolvable_over_seeds(
    differences: npt.ArrayLike, power: float = 0.8, alpha: float = 0.05
) -> float:
    """The same for algorithms trained again: `differences` (seeds, episodes), two of each or more.

    Seeds and the episodes that all of them share are the two sources of `hierarchical_difference`,
    each with its own t quantiles.
    """
    spread = _crossed(finite(differences, "differences", 2))
    return spread.wide(spread.seeds, _detecting(power, alpha))


def seeds_to_resolve(
    differences: npt.ArrayLike, target: float, power: float = 0.8, alpha: float = 0.05
) -> float:
    """The fewest seeds, on as many episodes, whose `resolvable_over_seeds` is at most `target`.

    Infinite where no number is enough, or next to none: more seeds do not average out what the
    episodes add, which all of them share.
    """
    spread = _crossed(finite(differences, "differences", 2))
    factor = _detecting(power, alpha)
    shared = factor(spread.episodes - 1) * math.sqrt(spread.from_episodes)
    if shared >= 0.99 * target > 0:
        return math.inf
    return _fewest(lambda seeds: spread.wide(seeds, factor), target)


def _fewest(resolvable: Callable[[int], float], target: float) -> int:
    """The fewest (from 2) at which `resolvable`, which falls, is at most `target`."""
    if not target > 0:
        raise ValueError(f"target is {target}, not positive")
    most = 2
    while resolvable(most) > target:
        most *= 2
    candidates = range(2, most + 1)
    return candidates[bisect_left(candidates, True, key=lambda n: resolvable(n) <= target)]


# Margins set beforehand


def non_inferiority(differences: npt.ArrayLike, margin: float, alpha: float = 0.05) -> MarginTest:
    """Test that new - baseline, `differences` (episodes,), has a mean above -margin.

    Higher values are better. One-sided paired t test: it passes when a loss of `margin` is ruled
    out, not when no loss was found. At least two episodes.
    """
    d = finite(differences, "differences")
    if not (margin > 0 and math.isfinite(margin)):
        raise ValueError(f"margin is {margin}, not a positive number")
    inside_unit(2 * alpha, "twice alpha")
    error = _deviation(d) / math.sqrt(d.size)
    interval = mean_interval(d, 1 - 2 * alpha)
    p = _t_tail(_quotient(interval.estimate + margin, error), d.size - 1)
    return MarginTest(interval, margin, p, p < alpha)


# Times and bytes


def paired_ratio(a: npt.ArrayLike, b: npt.ArrayLike, confidence: float = 0.95) -> Interval:
    """Median of a / b over paired repeats, both (repeats,) and positive: times or bytes.

    Repeats are paired by interleaving (a b a b ...), so that a machine's drift cancels in each
    ratio. What remains on a shared machine are stray repeats, several times too slow: the median
    ignores them, and its interval between order statistics asks nothing of their distribution
    (interpolated to the level wanted: Hettmansperger and Sheather 1986,
    https://doi.org/10.1016/0167-7152(86)90021-0). Computed on logarithms, so that b / a is the
    exact inverse. Too few repeats for the level (under 6 for 95%) give NaN bounds.
    """
    x, y = finite(a, "a"), finite(b, "b")
    if x.min() <= 0 or y.min() <= 0:
        raise ValueError("a ratio needs positive values")
    inside_unit(confidence, "confidence")
    ratios = np.sort(_differences(np.log(x), np.log(y), 1))
    n = ratios.size
    # The k-th values from either end enclose the median more often than `confidence`, the next
    # ones inwards less often.
    below = special.bdtr(np.arange(n + 1), n, 0.5)  # of n coins, up to 0, 1, ... n heads
    k = int(np.searchsorted(below, (1 - confidence) / 2))
    low = high = math.nan
    if k > 0:
        outer, inner = 1 - 2 * below[[k - 1, k]]
        share = (outer - confidence) / (outer - inner)
        weight = (n - k) * share / (k + (n - 2 * k) * share)
        low = math.exp((1 - weight) * ratios[k - 1] + weight * ratios[k])
        high = math.exp((1 - weight) * ratios[n - k] + weight * ratios[n - k - 1])
    return Interval(math.exp(float(np.median(ratios))), low, high, n, "repeats", confidence)


# Shared steps


def _differences(a: npt.ArrayLike, b: npt.ArrayLike, dimensions: int) -> Floats:
    x, y = finite(a, "a", dimensions), finite(b, "b", dimensions)
    if x.shape != y.shape:
        raise ValueError(f"a has shape {x.shape} and b {y.shape}: they are not paired")
    return x - y


def _standard_error(x: Floats) -> float:
    return float(x.std(ddof=1)) / math.sqrt(x.size) if x.size > 1 else math.nan


def _deviation(x: Floats) -> float:
    if x.size < 2:
        raise ValueError("one value has no spread: at least 2 are needed")
    return float(x.std(ddof=1))


def _t_quantile(alpha: float, freedom: int) -> float:
    """The two-sided critical value of Student's t; NaN without a degree of freedom."""
    return -float(special.stdtrit(freedom, alpha / 2)) if freedom > 0 else math.nan


def _t_tail(t: float, freedom: int) -> float:
    return float(special.stdtr(freedom, -t)) if freedom > 0 else math.nan


def _quotient(mean: float, spread: float) -> float:
    """mean / spread, where nothing varies: 0 for no difference, else infinite."""
    if spread == 0:
        return math.copysign(math.inf, mean) if mean else 0.0
    return mean / spread


def _sign_flip_p(d: Floats, grain: float, seed: int) -> float:
    """Two-sided p of the mean of d (n,), each known to a grain, under random signs: 10,000 draws.

    The draws count the data themselves among them (Phipson and Smyth 2010), so p is never 0.
    """
    generator = np.random.default_rng(seed)
    # Sums equal but for rounding are equal.
    observed = abs(float(d.sum())) - d.size * grain
    batches, draws = 10, 1000
    extreme = 0
    for _ in range(batches):
        signs = 2 * generator.integers(0, 2, size=(draws, d.size), dtype=np.int8) - 1
        extreme += int((np.abs(signs @ d) >= observed).sum())
    return (extreme + 1) / (batches * draws + 1)


def _level_where(excess: Callable[[float], float]) -> float:
    """The level in (0, 1] where `excess`, which falls with it, is zero: a p value."""
    from scipy import optimize  # a tenth of a second, as above

    smallest = 1e-100
    if excess(1.0) >= 0:
        return 1.0
    if excess(smallest) <= 0:
        return 0.0
    return math.exp(
        float(optimize.brentq(lambda log_p: excess(math.exp(log_p)), math.log(smallest), 0.0))
    )


def _resolvable(deviation: float, episodes: int, power: float, alpha: float) -> float:
    return _detecting(power, alpha)(episodes - 1) * deviation / math.sqrt(episodes)


def _detecting(power: float, alpha: float) -> Callable[[int], float]:
    """By degrees of freedom, how many standard errors a mean has to be from 0 to be found."""
    inside_unit(power, "power")
    inside_unit(alpha, "alpha")
    return lambda freedom: _errors_to_detect(freedom, power, alpha)


@cache
def _errors_to_detect(freedom: int, power: float, alpha: float) -> float:
    """Asked again for each of thousands of pairs."""
    if freedom < 1:
        return math.nan
    critical = _t_quantile(alpha, freedom)
    if critical > 100:
        # The noise of the mean is nothing beside that of its standard error, a chi: within 1e-4 of
        # what the series below, which then has no end, comes to.
        return critical * math.sqrt(float(special.chdtri(freedom, 1 - power)) / freedom)
    return float(special.nctdtrinc(freedom, 1 - power, critical))
