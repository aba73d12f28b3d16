"""Numbers for people keep the digits that say something."""

import pytest

from bench.wording import decimals, digits_of, milliseconds, score


def test_small_errors_are_not_rounded_away() -> None:
    row = {"metric": "mse", "mean": 2e-4, "ci95": 3e-5, "ci_seeds": float("nan")}
    assert score(row) == "0.000200 ± 0.000030"
    assert score(row, "ci_seeds") == "0.00020"
    assert (decimals("mse", 0.327, 0.033), decimals("mse", 0.0, float("nan"))) == (3, 3)
    assert digits_of(0.00123, 2) == 4


def test_accuracies_are_in_per_cent_to_a_digit_of_their_interval() -> None:
    row = {"metric": "accuracy", "mean": 0.5, "ci95": 0.01}
    assert score(row) == "50.0 ± 1.0%"
    assert score(row | {"ci95": 0.00042}) == "50.00 ± 0.04%"


@pytest.mark.parametrize(
    ("value", "spread", "said"),
    [
        (1186.6, 84.4, "1187 (84)"),
        (6.03, 0.456, "6.03 (0.46)"),
        (0.0004, 0.0001, "0.00 (0.00)"),
        (69.31, float("nan"), "69.3"),
        (float("nan"), float("nan"), ""),
    ],
)
def test_times_have_three_digits_and_their_spread_as_many_decimals(
    value: float, spread: float, said: str
) -> None:
    assert milliseconds(value, spread) == said
