"""Allocation: the configuration of least predicted cost under a budget, a multiple-choice knapsack.

A Lagrange multiplier gives a configuration and a bound within milliseconds. Where they are far apart, as when one table
is a fifth of the model, dynamic programming over sizes finds a better one.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from coatrt.configs.space import ConfigSpace
from coatrt.errors import ConfigError
from coatrt.planning.candidates import least_cost_by_size

__all__ = ["CostTable", "cost_matrix", "lagrangian_choice", "near_optimal"]

CostTable = Mapping[str, Mapping[str, float]]
"""Matrix name → format text → predicted loss increase in nats per token."""

_NEAR = 1e-2  # relative distance from the bound that is near enough without dynamic programming


def cost_matrix(space: ConfigSpace, costs: CostTable) -> NDArray[np.float64]:
    """Return the cost of every group in every format, [groups, formats], summed over the matrices of a group.

    Raises:
        ConfigError: the table lacks a matrix or a format of the space.
    """
    by_name = space.model.by_name

    def cost(name: str, column: int) -> float:
        fmt = space.formats[column]
        row = costs.get(name, {})
        for text in (str(fmt), str(fmt.effective(by_name[name].K))):
            if text in row:
                return float(row[text])
        raise ConfigError(f"the adapter has no sensitivity of {name} in {fmt}; train again (coatrt train)")

    columns = range(len(space.formats))
    return np.array([[sum(cost(name, column) for name in group) for column in columns] for group in space.groups])


def near_optimal(price: NDArray[np.float64], size: NDArray[np.float64], limit: float) -> NDArray[np.int64]:
    """Return the format number of every group: nearly the least Σ price with Σ size at most `limit`.

    It takes a few milliseconds, some twenty where dynamic programming is needed: for many budgets or disturbed costs.

    Args:
        price: cost by group and format, [groups, formats].
        size: bytes, [groups, formats]; the least of every group together must meet the limit.
        limit: most bytes.
    """
    rows = np.arange(len(price))
    choice, floor = lagrangian_choice(price, size, limit)
    choice = _exchanged(price, size, limit, choice)
    value = float(price[rows, choice].sum())
    if value - floor > _NEAR * abs(value):
        tried = least_cost_by_size(price, size.astype(np.int64))
        tried = tried[size[rows, tried].sum(1) <= limit]
        if len(tried):
            best = tried[price[rows, tried].sum(1).argmin()].astype(np.int64)
            best = _exchanged(price, size, limit, best)
            if price[rows, best].sum() < value:
                choice = best
    return choice


def lagrangian_choice(
    price: NDArray[np.float64], size: NDArray[np.float64], limit: float
) -> tuple[NDArray[np.int64], float]:
    """Return a near-optimal choice per group, in about a millisecond.

    Least Σ price + λ·size for the least λ that keeps the limit, then single changes that use up the remaining bytes.

    Returns:
        (format number of every group, greatest lower bound of the least Σ price); for the arguments see `near_optimal`.
    """
    rows = np.arange(len(price))
    unit = max(float(np.ptp(price, 1).max()), 1e-300) / max(float(np.ptp(size, 1).max()), 1e-300)
    choice = size.argmin(1)
    floor = float(price.min(1).sum())
    low, high = -30.0, 30.0  # log of λ over its unit
    for _ in range(60):
        middle = (low + high) / 2
        weight = np.exp(middle) * unit
        total = price + weight * size
        tried = total.argmin(1)
        dual = float(total[rows, tried].sum() - weight * limit)
        floor = max(floor, dual)
        if size[rows, tried].sum() <= limit:
            choice, high = tried, middle
        else:
            low = middle
    choice = choice.copy()
    for _ in range(4 * len(rows)):
        gain = price[rows, choice][:, None] - price
        fits = size - size[rows, choice][:, None] <= limit - size[rows, choice].sum()
        gain[~fits] = 0.0
        row, column = divmod(int(gain.argmax()), gain.shape[1])
        if gain[row, column] <= 0:
            break
        choice[row] = column
    return choice, floor


def _exchanged(
    price: NDArray[np.float64], size: NDArray[np.float64], limit: float, choice: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return a choice improved by changing two groups at once, the second freeing the bytes that the first takes."""
    choice, rows, columns = choice.copy(), np.arange(len(choice)), price.shape[1]
    for _ in range(2 * len(rows)):
        gain = (price[rows, choice][:, None] - price).ravel()
        extra = (size - size[rows, choice][:, None]).ravel()
        slack = limit - size[rows, choice].sum()
        back = np.argsort(-extra, kind="stable")  # least freed first
        best = np.maximum.accumulate(gain[back][::-1])[::-1]  # best gain among those that free at least as much
        place = np.searchsorted(-extra[back], extra - slack)
        total = np.where(place < len(back), gain + best[np.minimum(place, len(back) - 1)], -np.inf)
        first = int(total.argmax())
        partners = np.flatnonzero(extra <= slack - extra[first])
        partners = partners[partners // columns != first // columns]
        if not len(partners):
            break
        second = int(partners[gain[partners].argmax()])
        if gain[first] + gain[second] <= 1e-12 * abs(price[rows, choice].sum()):
            break
        choice[[first // columns, second // columns]] = first % columns, second % columns
    return choice
