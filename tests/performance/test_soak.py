"""The soak finds what grows, and does not find what only wanders."""

import numpy as np
from scipy import signal

from tests.performance.soak import slope, soak

ITERATIONS = np.arange(1, 1001) * 20


def wandering(seed: int) -> np.ndarray:
    """Noise of which neighbours are alike over about fifty samples."""
    noise = np.random.default_rng(seed).normal(0, 1e5, 1000)
    return 5e8 + signal.lfilter([1], [1, -0.98], noise)


def test_an_interval_covers_a_slope_under_noise_that_wanders() -> None:
    covered = 0
    for seed in range(100):
        _, low, high = slope(ITERATIONS, wandering(seed) + 100.0 * ITERATIONS)
        covered += low <= 100 <= high
    assert covered >= 85  # of 100; where 93 are to be expected


def test_a_leak_of_a_kibibyte_an_iteration_is_found() -> None:
    estimate, low, _ = slope(ITERATIONS, wandering(0) + 1024.0 * ITERATIONS)
    assert low > 0
    assert abs(estimate - 1024) < 500


def test_a_short_soak_notes_what_the_process_holds(tmp_path) -> None:
    held = soak("batched", 20, tmp_path / "training.safetensors")
    assert held["iteration"].tolist() == list(range(1, 21))
    assert (held["rss"] > 2**20).all()
    assert held["files"].nunique() == held["threads"].nunique() == 1
