"""Candidates of a plan: configurations on the front of bytes, predicted seconds and loss, by dynamic programming.

A plan picks from one fixed set, whatever its limits, so that more memory can never give a worse predicted loss.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from coatrt.configs.space import ConfigSpace
from coatrt.errors import ConfigError

__all__ = ["CandidateCache", "candidates", "least_cost_by_size"]

CandidateCache = dict[tuple[Any, ...], NDArray[np.int16]]
"""Candidates by a key of everything they depend on: devices with the same formats and relative speeds share them."""

_BINS = 4096
_BLENDS: tuple[float, ...] = (0.0, 0.1, 0.3, 1.0, 3.0, 30.0)  # weight of the seconds' range against the loss's range


def least_cost_by_size(cost: NDArray[np.float64], sizes: NDArray[np.int64], bins: int = _BINS) -> NDArray[np.int16]:
    """Return the choices of least total cost, one for each of `bins` total sizes, [n, groups].

    Sizes are rounded to the nearest of `bins` steps between the least and the greatest total, so a choice is the best
    of its true size up to about one step. Choices with an infinite cost are never taken.

    Args:
        cost: [groups, formats], infinite where a format is not allowed.
        sizes: bytes, [groups, formats].
        bins: steps.

    Raises:
        ConfigError: a group has no allowed format.
    """
    allowed = np.isfinite(cost)
    if not allowed.any(1).all():
        raise ConfigError("the pins leave a matrix without an allowed format; drop a --keep")
    low = np.where(allowed, sizes, np.iinfo(np.int64).max).min(1)
    extra = np.where(allowed, sizes - low[:, None], 0)
    unit = max(float(extra.max(1).sum()) / max(bins - 1, 1), 1.0)
    steps = np.rint(extra / unit).astype(np.int64)
    width = int(steps.max(1).sum()) + 1
    value = np.full(width, np.inf)
    value[0] = 0.0
    reached = 1
    taken = np.zeros((len(cost), width), np.int16)
    for group in range(len(cost)):
        columns = np.flatnonzero(allowed[group])
        reach = reached + int(steps[group].max())
        tried = np.full((len(columns), reach), np.inf)
        for row, column in enumerate(columns):
            step = steps[group, column]
            tried[row, step : step + reached] = value[:reached] + cost[group, column]
        best = tried.argmin(0)
        value[:reach] = tried[best, np.arange(reach)]
        taken[group, :reach] = columns[best]
        reached = reach
    place = np.flatnonzero(np.isfinite(value))
    choices = np.empty((len(place), len(cost)), np.int16)
    for group in range(len(cost) - 1, -1, -1):
        choices[:, group] = taken[group, place]
        place = place - steps[group, choices[:, group]]
    return choices


def candidates(
    space: ConfigSpace,
    cost: NDArray[np.float64],
    seconds: NDArray[np.float64] | None = None,
    cache: CandidateCache | None = None,
) -> NDArray[np.int16]:
    """Return the candidates of a space: the format number of every group, [n, groups].

    Args:
        space: matrices and formats.
        cost: predicted loss increase, [groups, formats]; infinite where a pin or the device forbids a format.
        seconds: predicted decode seconds in any unit, [groups, formats], which are rounded to a hundredth of their
            range; None takes bytes in their place.
        cache: earlier candidates; these are added.

    Raises:
        ConfigError: a group has no allowed format.
    """
    cache, sizes, allowed = {} if cache is None else cache, space.sizes, np.isfinite(cost)
    time, blends = sizes.astype(np.float64), _BLENDS[:1]  # bytes alone, and loss
    if seconds is not None:  # seconds that all formats of a group share decide nothing
        apart = seconds - seconds.min(1, keepdims=True)
        time = np.round(apart / max(float(apart.max()), 1e-300), 2)
        blends = blends if _follows(time, sizes, allowed) else _BLENDS
    key = (space.groups, space.formats, cost.tobytes(), sizes.tobytes(), time.tobytes(), blends)
    if key in cache:
        return cache[key]
    unit = _range(cost, allowed) / max(_range(time, allowed), 1e-300)
    parts = [
        least_cost_by_size(cost + blend * unit * time, sizes, _BINS if blend == 0 else _BINS // 4) for blend in blends
    ]
    choices = np.concatenate(parts)
    if len(parts) > 1:  # drop equal rows by keys of 64 random bits
        words = np.random.default_rng(0).integers(-(1 << 62), 1 << 62, len(cost))
        choices = choices[np.unique(choices @ words, return_index=True)[1]]
    cache[key] = choices
    return choices


def _range(values: NDArray[np.float64], allowed: NDArray[np.bool_]) -> float:
    """Return the greatest less the least total."""
    most = np.where(allowed, values, -np.inf).max(1).sum()
    return max(float(most - np.where(allowed, values, np.inf).min(1).sum()), 1e-300)


def _follows(time: NDArray[np.float64], sizes: NDArray[np.int64], allowed: NDArray[np.bool_]) -> bool:
    """Return whether seconds are proportional to bytes, up to a constant per group: then bytes stand for both."""
    first = allowed.argmax(1)
    rows = np.arange(len(sizes))
    bytes_apart = (sizes - sizes[rows, first][:, None])[allowed].astype(np.float64)
    seconds_apart = (time - time[rows, first][:, None])[allowed]
    factor = float(bytes_apart @ seconds_apart) / max(float(bytes_apart @ bytes_apart), 1e-300)
    return bool(np.abs(seconds_apart - factor * bytes_apart).max() <= 1e-6 * max(np.abs(seconds_apart).max(), 1e-300))
