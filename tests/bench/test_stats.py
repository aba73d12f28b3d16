"""Statistics against published examples, against scipy, and in simulations with a known truth."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests

from bench import rankings, stats

STUDIES = 2000
few = settings(max_examples=25, deadline=None)

# Hours of sleep gained under two drugs, ten patients (Student 1908).
SLEEP_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SLEEP_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]

# Cross- minus self-fertilised maize, eighths of an inch, fifteen pairs (Darwin 1876).
MAIZE = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]

# AUC of C4.5 and three variants on 14 data sets (Demsar 2006, table 6). On "voting" the last two
# are printed alike and ranked 2 and 3: a digit more tells them apart.
DEMSAR = np.array(
    [
        [0.763, 0.768, 0.771, 0.798],
        [0.599, 0.591, 0.590, 0.569],
        [0.954, 0.971, 0.968, 0.967],
        [0.628, 0.661, 0.654, 0.657],
        [0.882, 0.888, 0.886, 0.898],
        [0.936, 0.931, 0.916, 0.931],
        [0.661, 0.668, 0.609, 0.685],
        [0.583, 0.583, 0.563, 0.625],
        [0.775, 0.838, 0.866, 0.875],
        [1.000, 1.000, 1.000, 1.000],
        [0.940, 0.962, 0.965, 0.962],
        [0.619, 0.666, 0.614, 0.669],
        [0.972, 0.981, 0.9751, 0.975],
        [0.957, 0.978, 0.946, 0.970],
    ]
)

scores = arrays(float, st.integers(2, 12), elements=st.integers(-50, 50).map(lambda i: i / 8))
paired = st.integers(2, 8).flatmap(
    lambda n: st.tuples(*[arrays(float, n, elements=st.integers(-50, 50)) for _ in "ab"])
)
positive = st.integers(6, 12).flatmap(
    lambda n: st.tuples(*[arrays(float, n, elements=st.floats(0.01, 100)) for _ in "ab"])
)


def covers(interval, truth):
    return interval.low <= truth <= interval.high


def share(outcomes):
    """The share of true outcomes among STUDIES of them."""
    outcomes = list(outcomes)
    assert len(outcomes) == STUDIES
    return np.mean(outcomes)


# Intervals


def test_mean_interval_is_students():
    interval = stats.mean_interval(np.subtract(SLEEP_1, SLEEP_2))
    assert interval.estimate == pytest.approx(-1.58)
    assert (interval.low, interval.high) == pytest.approx((-2.4598858, -0.7001142))
    assert (interval.n, interval.over, interval.confidence) == (10, "episodes", 0.95)
    assert interval.half_width == pytest.approx(0.8798858)


def test_three_seeds_pay_the_t_factor():
    interval = stats.mean_interval([1.0, 2.0, 3.0], over="seeds")
    assert interval.half_width == pytest.approx(4.302653 / math.sqrt(3))
    assert interval.over == "seeds"


def test_one_value_has_no_interval():
    interval = stats.mean_interval([0.5])
    assert interval.estimate == 0.5
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


@pytest.mark.parametrize("n", [3, 10, 100])
def test_mean_interval_covers(n):
    values = np.random.default_rng(0).normal(3, 2, size=(STUDIES, n))
    assert 0.93 <= share(covers(stats.mean_interval(x), 3) for x in values) <= 0.97


@few
@given(scores, st.integers(-20, 20))
def test_mean_interval_shifts_with_its_values(values, shift):
    before, after = stats.mean_interval(values), stats.mean_interval(values + shift)
    assert after.low == pytest.approx(before.low + shift)
    assert after.high == pytest.approx(before.high + shift)


def test_binomial_floor():
    assert stats.binomial_floor(0.5, queries=1, episodes=10_001) == pytest.approx(0.0098, rel=1e-3)
    few, many = (stats.binomial_floor(0.9, q, 600) for q in (1, 100))
    assert few == pytest.approx(10 * many)


def test_below_floor_tells_independent_queries_from_a_standard_error_over_queries():
    generator = np.random.default_rng(0)
    honest = generator.binomial(75, 0.9, size=(200, 600)) / 75
    assert not any(stats.below_floor(stats.mean_interval(x), 75) for x in honest)
    averaged = honest.reshape(200, 60, 10).mean(axis=2)  # ten episodes passed off as one
    assert all(stats.below_floor(stats.mean_interval(x), 75) for x in averaged)
    one_label = stats.mean_interval(np.full(600, 0.2))
    assert stats.below_floor(one_label, 75)
    assert not stats.below_floor(stats.mean_interval(np.ones(600)), 75)
    assert not stats.below_floor(stats.mean_interval([0.9]), 75)


# Classes


def tasks(generator, episodes, known, ways, class_effect):
    """Values (episodes,) around 0 with an effect of each class, and their classes."""
    classes = generator.random((episodes, known)).argpartition(ways, axis=1)[:, :ways]
    effects = generator.normal(0, class_effect, known)
    return effects[classes].mean(axis=1) + generator.normal(0, 0.1, episodes), classes


def test_class_interval_is_the_regression_on_shared_classes():
    values, classes = tasks(np.random.default_rng(0), 60, 12, 5, 0.2)
    deviation = values - values.mean()
    first, second = np.triu_indices(60, 1)
    common = [len(set(classes[i]) & set(classes[j])) for i, j in zip(first, second, strict=True)]
    slope = np.polyfit(common, deviation[first] * deviation[second], 1)[0]
    variance = values.var(ddof=1)
    slope_error = variance / np.std(common) / math.sqrt(len(common))
    expected = math.sqrt(
        scipy_stats.t.ppf(0.975, 11) ** 2 * (slope + slope_error) * np.mean(common)
        + scipy_stats.t.ppf(0.975, 59) ** 2 * variance / 60
    )
    interval = stats.class_interval(values, classes)
    assert interval.half_width == pytest.approx(expected)
    assert (interval.estimate, interval.n, interval.over) == (values.mean(), 12, "classes")


@pytest.mark.parametrize(
    ("episodes", "known", "ways", "effect", "most"),
    [(600, 20, 5, 0.2, 0.97), (600, 20, 5, 0.05, 1), (150, 8, 5, 0.2, 0.97), (150, 64, 5, 0.2, 1)],
)
def test_class_interval_covers_new_classes(episodes, known, ways, effect, most):
    generator = np.random.default_rng(1)
    studies = [tasks(generator, episodes, known, ways, effect) for _ in range(STUDIES)]
    assert 0.93 <= share(covers(stats.class_interval(*study), 0) for study in studies) <= most


def test_class_interval_is_never_narrower_than_over_episodes():
    values, classes = tasks(np.random.default_rng(0), 200, 20, 5, 0)
    over_episodes = stats.mean_interval(values).half_width
    assert stats.class_interval(values, classes).half_width > over_episodes


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([[0, 1], [1, 2]], "integer array of shape"),
        ([[0.5, 1], [1, 2], [2, 3]], "integer array of shape"),
        ([[0, 1], [1, 1], [2, 3]], "names a class twice"),
        ([[0, 1], [1, 0], [0, 1]], "share equally many"),
        ([[0, 1], [2, 3], [4, 5]], "share equally many"),
    ],
)
def test_class_interval_refuses_classes_that_tell_nothing(classes, message):
    with pytest.raises(ValueError, match=message):
        stats.class_interval([0.1, 0.2, 0.3], classes)


# Two algorithms


def test_paired_difference_on_students_sleep_data():
    result = stats.paired_difference(SLEEP_1, SLEEP_2)
    assert result.interval == stats.mean_interval(np.subtract(SLEEP_1, SLEEP_2))
    assert result.p == pytest.approx(0.00283289, rel=1e-5)  # t = -4.0621
    assert result.effect == pytest.approx(-4.062128 / math.sqrt(10))
    assert (result.seeds, result.episodes) == (1, 10)


def test_paired_difference_on_darwins_maize():
    result = stats.paired_difference(MAIZE, np.zeros(15))
    assert result.p == pytest.approx(0.0497, abs=5e-5)  # t = 2.148
    assert result.p_wilcoxon == pytest.approx(0.0412598, abs=1e-6)  # T = 24
    # Fisher 1935, section 21: 1,726 of the 32,768 sign patterns are as extreme.
    assert result.p_permutation == pytest.approx(1726 / 32768, abs=0.007)


def test_sign_flips_agree_with_scipy():
    d = np.random.default_rng(3).normal(0.1, 1, 300)
    scipys = scipy_stats.permutation_test(
        (d,), np.mean, permutation_type="samples", vectorized=True, n_resamples=9999
    ).pvalue
    ours = stats.paired_difference(d, np.zeros(300)).p_permutation
    assert ours == pytest.approx(scipys, abs=0.02)
    assert ours == stats.paired_difference(d, np.zeros(300)).p_permutation
    assert ours != stats.paired_difference(d, np.zeros(300), seed=1).p_permutation


def test_no_difference_anywhere_is_no_evidence():
    result = stats.paired_difference([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    assert (result.p, result.p_wilcoxon, result.p_permutation, result.effect) == (1, 1, 1, 0)
    assert (result.interval.low, result.interval.high) == (0, 0)


def test_the_same_difference_everywhere_is_infinitely_large():
    result = stats.paired_difference([1, 2, 3], [2, 3, 4])
    assert (result.p, result.effect) == (0, -math.inf)


def test_one_episode_has_no_p_value():
    result = stats.paired_difference([1], [2])
    assert math.isnan(result.p)
    assert math.isnan(result.effect)


def test_paired_difference_covers_and_its_tests_keep_their_level():
    generator = np.random.default_rng(0)
    difficulty = generator.normal(0, 3, size=(STUDIES, 12))
    a, b = (difficulty + generator.normal(0, 1, size=(STUDIES, 12)) for _ in "ab")
    results = [stats.paired_difference(x, y) for x, y in zip(a, b, strict=True)]
    assert 0.93 <= share(covers(r.interval, 0) for r in results) <= 0.97
    for p in ("p", "p_wilcoxon", "p_permutation"):
        assert 0.03 <= share(getattr(r, p) < 0.05 for r in results) <= 0.07


@few
@given(paired)
def test_swapping_the_algorithms_negates_the_difference(pair):
    a, b = pair
    forth, back = stats.paired_difference(a, b), stats.paired_difference(b, a)
    assert forth.interval.low == -back.interval.high
    assert forth.effect == -back.effect
    assert forth.p == back.p
    assert forth.p_wilcoxon == pytest.approx(back.p_wilcoxon)
    assert forth.p_permutation == back.p_permutation


@few
@given(paired, st.integers(-20, 20))
def test_what_both_algorithms_gain_changes_no_difference(pair, shift):
    a, b = pair
    assert stats.paired_difference(a + shift, b + shift) == stats.paired_difference(a, b)


# Over seeds and episodes


def crossed(generator, seeds, episodes, seed_share, draw):
    """Differences (seeds, episodes) around 0, `seed_share` of their mean's variance from seeds.

    Episodes and residuals have variance 1 each; `draw` gives standardised episode effects.
    """
    rest = 1 / episodes + 1 / (seeds * episodes)
    from_seeds = math.sqrt(seeds * rest * seed_share / (1 - seed_share))
    return (
        generator.normal(0, from_seeds, size=(seeds, 1))
        + draw(generator, episodes)
        + generator.normal(0, 1, size=(seeds, episodes))
    )


def symmetric(generator, n):
    return generator.normal(0, 1, n)


def skewed(generator, n):
    return generator.exponential(1, n) - 1


@pytest.mark.parametrize("draw", [symmetric, skewed])
@pytest.mark.parametrize("seed_share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seeds", [5, 10])
def test_hierarchical_difference_covers(seeds, seed_share, draw):
    generator = np.random.default_rng(0)
    results = [
        stats.hierarchical_difference(d, np.zeros_like(d))
        for d in (crossed(generator, seeds, 100, seed_share, draw) for _ in range(STUDIES))
    ]
    assert 0.93 <= share(covers(r.interval, 0) for r in results) <= 0.97
    assert 0.03 <= share(r.p < 0.05 for r in results) <= 0.07


@pytest.mark.parametrize("seed_share", [0, 0.5, 0.9])
@pytest.mark.parametrize("seeds", [2, 3, 4])
def test_hierarchical_difference_errs_on_the_side_of_width_with_few_seeds(seeds, seed_share):
    generator = np.random.default_rng(0)
    studies = (crossed(generator, seeds, 100, seed_share, symmetric) for _ in range(STUDIES))
    zeros = np.zeros((seeds, 100))
    covered = share(covers(stats.hierarchical_difference(d, zeros).interval, 0) for d in studies)
    assert 0.94 <= covered <= 0.995


def test_hierarchical_difference_adds_seeds_and_episodes():
    of_seed, of_episode = np.array([1.0, 2.0, 6.0]), np.array([0.0, 1.0, 2.0, 5.0])
    result = stats.hierarchical_difference(of_seed[:, None] + of_episode, np.zeros((3, 4)))
    seeds, episodes = stats.mean_interval(of_seed), stats.mean_interval(of_episode)
    assert result.interval.estimate == pytest.approx(seeds.estimate + episodes.estimate)
    expected = math.hypot(seeds.half_width, episodes.half_width)
    assert result.interval.half_width == pytest.approx(expected)
    assert (result.interval.n, result.interval.over) == (3, "seeds")
    assert (result.seeds, result.episodes) == (3, 4)
    spread = math.sqrt(of_seed.var(ddof=1) + of_episode.var(ddof=1))
    assert result.effect == pytest.approx(result.interval.estimate / spread)


def test_hierarchical_difference_without_episode_effects_is_the_t_interval_over_seeds():
    opposed = np.array([[1.0, -1.0], [-1.0, 1.0], [3.0, 3.0], [2.0, 2.0]])
    result = stats.hierarchical_difference(opposed, np.zeros((4, 2)))
    over_seeds = stats.mean_interval(opposed.mean(axis=1), over="seeds")
    assert result.interval.half_width == pytest.approx(over_seeds.half_width)
    assert result.p == pytest.approx(scipy_stats.ttest_1samp(opposed.mean(axis=1), 0).pvalue)


def test_hierarchical_p_value_is_where_the_interval_touches_zero():
    d = crossed(np.random.default_rng(5), 5, 50, 0.5, symmetric) + 0.3
    result = stats.hierarchical_difference(d, np.zeros_like(d))
    touching = stats.hierarchical_difference(d, np.zeros_like(d), confidence=1 - result.p)
    assert min(abs(touching.interval.low), abs(touching.interval.high)) < 1e-9


def test_hierarchical_difference_where_nothing_varies():
    none, some = np.zeros((3, 4)), np.ones((3, 4))
    assert stats.hierarchical_difference(none, none).p == 1
    assert stats.hierarchical_difference(some, none).p == 0
    assert stats.hierarchical_difference(some, none).effect == math.inf


def test_hierarchical_difference_swapped_is_negated():
    generator = np.random.default_rng(0)
    a, b = generator.random((2, 4, 30))
    forth, back = stats.hierarchical_difference(a, b), stats.hierarchical_difference(b, a)
    assert forth.interval.low == pytest.approx(-back.interval.high)
    assert forth.p == pytest.approx(back.p)
    assert forth.effect == pytest.approx(-back.effect)


@pytest.mark.parametrize("shape", [(1, 10), (10, 1)])
def test_hierarchical_difference_needs_two_of_each(shape):
    with pytest.raises(ValueError, match="at least 2 of each"):
        stats.hierarchical_difference(np.zeros(shape), np.zeros(shape))


# Resolution and margins


@pytest.mark.parametrize(("effect", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_episodes_to_resolve_agrees_with_g_power(effect, pairs):
    """G*Power 3.1, difference of two dependent means, two-sided, alpha 0.05, power 0.8."""
    assert stats.episodes_to_resolve([-1 / math.sqrt(2), 1 / math.sqrt(2)], effect) == pairs


@few
@given(scores.filter(lambda x: np.ptp(x) > 0))
def test_what_is_resolvable_needs_the_episodes_there_are(differences):
    resolvable = stats.resolvable_difference(differences)
    assert stats.episodes_to_resolve(differences, resolvable) == len(differences)


def test_a_resolvable_difference_is_found_as_often_as_promised():
    generator = np.random.default_rng(0)
    studies = generator.normal(0, 1, size=(STUDIES, 50))
    true = stats.resolvable_difference(studies.ravel()[:50] / studies.ravel()[:50].std(ddof=1))
    found = (stats.mean_interval(d + true) for d in studies)
    assert 0.77 <= share(interval.low > 0 for interval in found) <= 0.83


def test_what_seeds_resolve_is_that_of_the_source_that_varies():
    of_seed, of_episode = np.array([1.0, 2.0, 6.0, 4.0]), np.array([0.0, 1.0, 2.0, 5.0, 7.0])
    seeds_vary, episodes_vary = np.tile(of_seed[:, None], 5), np.tile(of_episode, (4, 1))
    for table, sample in ((seeds_vary, of_seed), (episodes_vary, of_episode)):
        alone = stats.resolvable_difference(sample)
        assert stats.resolvable_over_seeds(table) == pytest.approx(alone)
    both = stats.resolvable_over_seeds(seeds_vary + episodes_vary)
    alone = [stats.resolvable_difference(sample) for sample in (of_seed, of_episode)]
    assert both == pytest.approx(math.hypot(*alone))


def test_more_seeds_resolve_more_as_far_as_the_episodes_allow():
    of_seed, of_episode = np.array([1.0, 2.0, 6.0, 4.0]), np.array([0.0, 1.0, 2.0, 5.0, 7.0])
    seeds_vary = np.tile(of_seed[:, None], 5)
    wanted = stats.resolvable_difference(of_seed) / 2
    assert stats.seeds_to_resolve(seeds_vary, wanted) == stats.episodes_to_resolve(of_seed, wanted)
    table = seeds_vary + of_episode
    limit = stats.resolvable_difference(of_episode)
    assert stats.seeds_to_resolve(table, 0.9 * limit) == math.inf
    needed = stats.seeds_to_resolve(table, 1.2 * limit)
    assert 4 < needed < math.inf
    assert stats.seeds_to_resolve(table, stats.resolvable_over_seeds(table)) == 4


@pytest.mark.parametrize("seed_share", [0.1, 0.9])
def test_what_seeds_resolve_is_found_about_as_often_as_promised(seed_share):
    """A plug-in of the true variances is not at hand: the studies' own median stands for it."""
    generator = np.random.default_rng(0)
    studies = [crossed(generator, 10, 50, seed_share, symmetric) for _ in range(STUDIES)]
    true = float(np.median([stats.resolvable_over_seeds(d) for d in studies]))
    zeros = np.zeros((10, 50))
    found = share(stats.hierarchical_difference(d + true, zeros).interval.low > 0 for d in studies)
    assert 0.74 <= found <= 0.86


def test_differences_that_do_not_vary_resolve_anything():
    assert stats.resolvable_difference([0.1, 0.1]) == 0
    assert stats.episodes_to_resolve([0.1, 0.1], 0.001) == 2


def test_non_inferiority_agrees_with_scipy_and_its_interval():
    d = np.random.default_rng(0).normal(-0.3, 1, 200)
    for margin in (0.35, 0.45, 0.6):
        test = stats.non_inferiority(d, margin)
        p = scipy_stats.ttest_1samp(d, -margin, alternative="greater").pvalue
        assert test.p == pytest.approx(p)
        assert test.passed == (test.interval.low > -margin) == (test.p < 0.05)
        assert test.interval.confidence == pytest.approx(0.9)


def test_non_inferiority_passes_what_is_identical_and_not_what_loses_the_margin():
    assert stats.non_inferiority(np.zeros(10), 0.01).passed
    at_margin = np.random.default_rng(0).normal(-1, 1, size=(STUDIES, 30))
    assert 0.03 <= share(stats.non_inferiority(d, 1).passed for d in at_margin) <= 0.07


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.non_inferiority([1, 2], 0), "margin is 0"),
        (lambda: stats.non_inferiority([1, 2], math.nan), "margin is nan"),
        (lambda: stats.non_inferiority([1], 1), "at least 2"),
        (lambda: stats.non_inferiority([1, 2], 1, alpha=0.5), "twice alpha is 1.0"),
        (lambda: stats.resolvable_difference([1]), "at least 2"),
        (lambda: stats.resolvable_difference([1, 2], power=1), "power is 1"),
        (lambda: stats.episodes_to_resolve([1, 2], 0), "target is 0"),
        (lambda: stats.episodes_to_resolve([1, 2], 1, alpha=0), "alpha is 0"),
        (lambda: stats.binomial_floor(98.1, 75, 600), "not a fraction"),
        (lambda: stats.binomial_floor(0.9, 0, 600), "not both positive"),
        (lambda: stats.mean_interval([1, 2], confidence=95), "confidence is 95"),
    ],
)
def test_settings_that_make_no_sense_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Ratios


def test_paired_ratio_ignores_stray_repeats():
    b = np.full(20, 2.0)
    a = np.full(20, 5.0)
    a[3] = 500.0
    b[11] = 90.0
    ratio = stats.paired_ratio(a, b)
    assert (ratio.estimate, ratio.low, ratio.high) == pytest.approx((2.5, 2.5, 2.5))
    assert (ratio.n, ratio.over) == (20, "repeats")


def test_paired_ratio_at_a_level_of_the_sign_test_is_the_order_statistics():
    """Of ten values the second and ninth enclose the median with probability 1 - 22 / 1024."""
    a = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    ratio = stats.paired_ratio(a, np.ones(10), confidence=1 - 22 / 1024)
    assert (ratio.low, ratio.high) == pytest.approx((2, 9))
    assert ratio.estimate == pytest.approx(math.sqrt(5 * 6))


@pytest.mark.parametrize(("repeats", "known"), [(5, False), (6, True)])
def test_paired_ratio_says_when_repeats_are_too_few(repeats, known):
    ratio = stats.paired_ratio(np.arange(1, repeats + 1), np.ones(repeats))
    assert math.isfinite(ratio.low) == math.isfinite(ratio.high) == known


def noisy_times(generator, shape):
    """Logarithms of times: never under their floor, one in eight delayed by up to many times."""
    jitter = np.abs(generator.normal(0, 0.02, shape))
    return jitter + (generator.random(shape) < 0.125) * generator.exponential(0.7, shape)


@pytest.mark.parametrize("repeats", [8, 20, 51])
def test_paired_ratio_covers_on_a_noisy_drifting_machine(repeats):
    generator = np.random.default_rng(0)
    shape = (STUDIES, repeats)
    drift = generator.normal(0, 0.05, shape).cumsum(axis=1)
    a, b = (np.exp(drift + noisy_times(generator, shape)) for _ in "ab")
    ratios = (stats.paired_ratio(2 * x, y) for x, y in zip(a, b, strict=True))
    assert 0.93 <= share(covers(r, 2) for r in ratios) <= 0.97


@few
@given(positive)
def test_the_ratio_the_other_way_is_the_inverse(pair):
    a, b = pair
    forth, back = stats.paired_ratio(a, b), stats.paired_ratio(b, a)
    assert forth.estimate == pytest.approx(1 / back.estimate)
    assert forth.low == pytest.approx(1 / back.high)
    assert forth.low <= forth.estimate * (1 + 1e-9)


def test_a_ratio_needs_positive_values():
    with pytest.raises(ValueError, match="positive"):
        stats.paired_ratio([1, 0], [1, 1])


# Several algorithms, several settings


def test_holm_on_a_worked_example():
    """Wikipedia, "Holm-Bonferroni method": at 0.05 the first and the last are rejected."""
    assert rankings.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_is_statsmodels():
    p = np.random.default_rng(0).random(30) ** 3
    p[3] = p[7]
    assert rankings.holm(p) == pytest.approx(multipletests(p, method="holm")[1])


@few
@given(arrays(float, st.integers(1, 20), elements=st.floats(0, 1)))
def test_holm_raises_p_values_and_keeps_their_order(p):
    adjusted = rankings.holm(p)
    assert (adjusted >= p).all()
    assert (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()


def test_friedman_and_nemenyi_on_demsars_table():
    result = rankings.friedman_nemenyi(DEMSAR)
    assert result.mean_ranks == pytest.approx([3.143, 2.000, 2.893, 1.964], abs=5e-4)
    # The paper's 9.28 is without the correction for ties: three pairs and one block of four.
    ties = (3 * (2**3 - 2) + (4**3 - 4)) / (14 * (4**3 - 4))
    assert result.statistic * (1 - ties) == pytest.approx(9.28, abs=5e-3)
    assert result.p < 0.05
    # Critical differences 1.25 at 0.05, which no pair reaches, and 1.12 at 0.10, which C4.5 exceeds
    # against the second and the fourth only.
    above = result.nemenyi[np.triu_indices(4, 1)]
    assert (above > 0.05).all()
    assert (above < 0.10).tolist() == [True, False, True, False, False, False]
    assert result.nemenyi == pytest.approx(result.nemenyi.T)
    assert not result.exploratory


def test_friedman_says_when_blocks_are_few_and_survives_ties():
    assert rankings.friedman_nemenyi(DEMSAR[:7]).exploratory
    assert not rankings.friedman_nemenyi(DEMSAR[:8]).exploratory
    tied = rankings.friedman_nemenyi(np.ones((5, 3)))
    assert (tied.statistic, tied.p) == (0, 1)
    assert tied.mean_ranks.tolist() == [2, 2, 2]
    assert (tied.nemenyi > 0.99).all()


def test_interquartile_mean_drops_a_quarter_at_either_end():
    assert rankings.interquartile_mean([[8, 1, 6, 3], [5, 4, 1000, 2]]) == 4.5
    assert rankings.interquartile_mean([[1, 2, 30]]) == 11  # a quarter of three is none
    for size in range(1, 12):
        scores = np.random.default_rng(size).normal(size=(2, size))
        trimmed = scipy_stats.trim_mean(scores, 0.25, axis=None)
        assert rankings.interquartile_mean(scores) == pytest.approx(trimmed)


def test_probability_of_improvement_is_mann_whitneys_with_ties_half():
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 6, size=(7, 3)), generator.integers(0, 5, size=(4, 3))
    u = [scipy_stats.mannwhitneyu(a[:, t], b[:, t]).statistic / 28 for t in range(3)]
    assert rankings.probability_of_improvement(a, b) == pytest.approx(np.mean(u))
    assert rankings.probability_of_improvement([[1], [2]], [[1], [2]]) == 0.5
    assert rankings.probability_of_improvement([[3], [4]], [[1], [2]]) == 1


def test_probability_of_improvement_swapped_is_its_complement():
    a, b = np.random.default_rng(0).random((2, 5, 4))
    forth, back = (rankings.probability_of_improvement(*pair) for pair in ((a, b), (b, a)))
    assert forth == pytest.approx(1 - back)


def test_stratified_bootstrap_redraws_seeds_within_tasks():
    constant_tasks = np.tile([1.0, 5.0, 9.0], (4, 1))
    interval = rankings.stratified_bootstrap(rankings.interquartile_mean, constant_tasks)
    assert interval.low == interval.high == interval.estimate == 5
    assert (interval.n, interval.over) == (4, "seeds")


def test_stratified_bootstrap_of_a_mean_has_its_standard_error():
    x = np.random.default_rng(0).normal(size=(20, 10))
    interval = rankings.stratified_bootstrap(np.mean, x)
    error = math.sqrt(x.var(axis=0).mean() / x.size)
    assert interval.half_width == pytest.approx(1.96 * error, rel=0.06)
    assert interval == rankings.stratified_bootstrap(np.mean, x)
    assert interval != rankings.stratified_bootstrap(np.mean, x, seed=1)


def test_stratified_bootstrap_of_two_algorithms():
    a, b = np.random.default_rng(0).random((2, 5, 4))
    chance = rankings.probability_of_improvement
    interval = rankings.stratified_bootstrap(chance, a + 0.2, b, resamples=300)
    assert interval.low < chance(a + 0.2, b) == interval.estimate < interval.high <= 1
    assert math.isnan(rankings.stratified_bootstrap(chance, a[:1], b).low)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rankings.holm([0.1, 1.2]), "from 0 to 1"),
        (lambda: rankings.friedman_nemenyi(np.ones((5, 2))), "at least 2 of 3"),
        (lambda: rankings.friedman_nemenyi(np.ones((1, 3))), "at least 2 of 3"),
        (lambda: rankings.probability_of_improvement([[1, 2]], [[1]]), "2 tasks and b 1"),
        (lambda: rankings.stratified_bootstrap(np.mean), "no scores"),
    ],
)
def test_rankings_refuse_what_makes_no_sense(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Bad input


@pytest.mark.parametrize(
    "function",
    [
        stats.mean_interval,
        stats.resolvable_difference,
        lambda x: stats.class_interval(x, [[1, 2]]),
        lambda x: stats.paired_difference(x, x),
        lambda x: stats.paired_ratio(x, x),
        lambda x: stats.episodes_to_resolve(x, 1),
        lambda x: stats.non_inferiority(x, 1),
        rankings.holm,
    ],
)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "is empty"),
        ([1, math.nan], "NaN"),
        ([1, math.inf], "infinity"),
        ([[1]], "2 dimensions"),
    ],
)
def test_bad_samples_are_refused_in_one_line(function, values, message):
    with pytest.raises(ValueError, match=message) as error:
        function(values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "function",
    [
        stats.hierarchical_difference,
        rankings.probability_of_improvement,
        lambda a, b: (rankings.interquartile_mean(a), rankings.friedman_nemenyi(a)),
        lambda a, b: rankings.stratified_bootstrap(rankings.interquartile_mean, a),
    ],
)
@pytest.mark.parametrize(
    ("values", "message"),
    [([[]], "is empty"), ([[1, math.nan]], "NaN"), ([1, 2], "1 dimensions")],
)
def test_bad_tables_are_refused_in_one_line(function, values, message):
    with pytest.raises(ValueError, match=message):
        function(values, values)


@pytest.mark.parametrize("compare", [stats.paired_difference, stats.paired_ratio])
def test_unpaired_lengths_are_refused(compare):
    with pytest.raises(ValueError, match="not paired"):
        compare([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="not paired"):
        stats.hierarchical_difference(np.zeros((2, 3)), np.zeros((3, 3)))


def test_equal_differences_of_float32_scores_are_ties_to_wilcoxon() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        hits = draw.integers(8, 18, (2, 200))
        a, b = (hits / 25).astype(np.float32).astype(float)
        expected = scipy_stats.wilcoxon((hits[0] - hits[1]).astype(float)).pvalue
        assert stats.paired_difference(a, b).p_wilcoxon == pytest.approx(expected)


def test_seeds_whose_means_coincide_are_no_certainty() -> None:
    # Two seeds' mean differences are exactly alike, though episodes differ: a lattice's accident.
    draw = np.random.default_rng(1)
    row = draw.integers(-5, 6, 100) / 25
    d = np.stack([row, draw.permutation(row)])
    found = stats.hierarchical_difference(d, np.zeros_like(d))
    assert found.interval.half_width > 0.1 * row.std() / 10
    assert found.p > 1e-4
    same = np.full((2, 100), 0.04)
    assert stats.hierarchical_difference(same, np.zeros_like(same)).interval.half_width == 0


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 6, 0.05 / 105, 0.05 / 24_750, 1e-12])
@pytest.mark.parametrize("freedom", [1, 2, 3, 9, 599])
def test_what_can_be_detected_is_detected_with_the_power_asked_for(freedom: int, alpha: float):
    shift = stats._detecting(0.8, alpha)(freedom)
    generator = np.random.default_rng(0)
    spread = np.sqrt(generator.chisquare(freedom, 400_000) / freedom)
    found = (generator.standard_normal(400_000) + shift) / spread > scipy_stats.t.isf(
        alpha / 2, freedom
    )
    assert found.mean() == pytest.approx(0.8, abs=0.004)
