"""Measured numbers as text, against scipy."""

import numpy as np
import pytest

from coatrt.evaluation.presentation import (
    accuracy_text,
    median_interval,
    overhead_text,
    perplexity_text,
    wilson_interval,
)


@pytest.mark.parametrize(("right", "count"), [(0, 1), (0, 8), (5, 8), (8, 8), (17, 40), (630, 1000)])
def test_the_interval_of_an_accuracy_is_wilsons(right: int, count: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right / count, count) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_an_accuracy_over_few_questions_says_how_little_it_says() -> None:
    assert accuracy_text(5 / 8, 8) == "62 % (31–86 %)"
    assert accuracy_text(0.5, 100_000) == "50.0 % (49.7–50.3 %)"


@pytest.mark.parametrize("count", [1, 2, 5, 6, 8, 9, 20, 101])
def test_the_interval_of_a_median_covers_it(count: int) -> None:
    """The chance that the median lies outside two ranks is binomial, whatever is measured."""
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(count).permutation(count).astype(float)
    low, high = median_interval(values.tolist())
    assert low + high == count - 1 or count == 1
    rank = int(low)

    def outside(rank: int) -> float:
        return float(2 * stats.binom.cdf(rank, count, 0.5))

    assert outside(rank) <= 0.05 or rank == 0
    assert outside(rank + 1) > 0.05 or rank + 1 >= count - rank - 1  # no narrower one does


def test_an_overhead_within_its_spread_is_no_number() -> None:
    assert overhead_text(-0.109, (-0.2, 0.15), 5) == "within noise (-20.0 to +15.0 % over 5 repetitions)"
    assert overhead_text(0.1, (0.08, 0.12), 5) == "+10.0 % (+8.0 to +12.0 %)"
    assert "not known from 2 repetitions" in overhead_text(0.1, (0.08, 0.12), 2)


def test_perplexities_keep_the_digits_that_are_read() -> None:
    assert [perplexity_text(np.log(value)) for value in (1.5, 42.71, 1234.4)] == ["1.50", "42.7", "1,234"]
    assert perplexity_text(1e18) == perplexity_text(700)  # no overflow
