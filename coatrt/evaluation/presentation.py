"""Measured numbers as text: perplexities, accuracies with their interval, overheads with their noise."""

import math
from collections.abc import Sequence

__all__ = ["accuracy_text", "median_interval", "overhead_text", "perplexity", "perplexity_text", "wilson_interval"]

_Z = 1.959964  # of the normal distribution: 95 % lie within ± Z standard deviations
_MOST_LOSS = 700.0  # its exponential is still a float
_LEAST_REPETITIONS = 5  # fewer tell no overhead from noise


def perplexity(loss: float) -> float:
    """Return the perplexity of a loss in nats per token: its exponential."""
    return math.exp(min(loss, _MOST_LOSS))


def perplexity_text(loss: float) -> str:
    """Return the perplexity of a loss with as many digits as are read: 6.31, 42.7, 1,234, 2.1e+09."""
    value = perplexity(loss)
    if value >= 1e6:
        return f"{value:.1e}"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of right answers (Wilson's score interval).

    Args:
        share: of right answers, 0 to 1.
        count: of questions, at least 1.
    """
    centre = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracy_text(share: float, count: int) -> str:
    """Return an accuracy over `count` questions with its 95 % interval: "62 % (31–86 %)"."""
    low, high = wilson_interval(share, count)
    digits = 0 if high - low > 0.02 else 1
    return f"{100 * share:.{digits}f} % ({100 * low:.{digits}f}–{100 * high:.{digits}f} %)"


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return an interval that covers the median of what the values are drawn from with 95 % probability.

    It is made of two of the values, whatever their distribution. Of fewer than six values it is their range, which
    covers less: 94 % of five.
    """
    ordered, count = sorted(values), len(values)
    outside, rank = 0.5**count, 0  # probability that the median lies below the value of this rank
    while rank + 1 < count - rank - 1:
        more = outside + math.comb(count, rank + 1) * 0.5**count
        if 2 * more > 0.05:
            break
        outside, rank = more, rank + 1
    return ordered[rank], ordered[count - 1 - rank]


def overhead_text(overhead: float, interval: Sequence[float], repetitions: int) -> str:
    """Return a relative overhead, or that the repetitions do not tell it from noise.

    Args:
        overhead: 0.1 is a tenth more time.
        interval: lowest and highest it may be, see `median_interval`.
        repetitions: how often it was measured.
    """
    if repetitions < _LEAST_REPETITIONS:
        return f"not known from {repetitions} repetitions; measure {_LEAST_REPETITIONS} or more (--repeat)"
    low, high = (f"{100 * value:+.1f}" for value in interval)
    if interval[0] <= 0 <= interval[1]:
        return f"within noise ({low} to {high} % over {repetitions} repetitions)"
    return f"{100 * overhead:+.1f} % ({low} to {high} %)"
