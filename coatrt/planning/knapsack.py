"""Allocation: the configuration of least predicted cost under a budget, a multiple-choice knapsack.

A Lagrange multiplier gives a configuration and a bound within milliseconds. Where they are far apart, as when one table
is a fifth of the model, dynamic programming over sizes finds a better one. The bound rules most choices out, exactly;
HiGHS settles what is left.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from coatrt.configs.config import QuantConfig
from coatrt.configs.space import ConfigSpace
from coatrt.errors import ConfigError
from coatrt.planning.candidates import least_cost_by_size

__all__ = ["CostTable", "allocate", "cost_matrix", "lagrangian_choice", "near_optimal", "near_optimal_each"]

CostTable = Mapping[str, Mapping[str, float]]
"""Matrix name → format text → predicted loss increase in nats per token."""

_NEAR = 1e-2  # relative distance from the bound that is near enough without dynamic programming
_GAP = 1e-4  # relative distance from the optimum at which the search ends
_SECONDS = 0.06  # HiGHS's limit, asked twice at most; the Lagrangian's configuration stands where it finds none better


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
        raise ConfigError(f"no sensitivity of {name} in {fmt}; measure it again for these formats (coatrt train)")

    columns = range(len(space.formats))
    return np.array([[sum(cost(name, column) for name in group) for column in columns] for group in space.groups])


def allocate(
    space: ConfigSpace, costs: CostTable, *, max_bytes: float | None = None, max_cost: float | None = None
) -> QuantConfig:
    """Return the best configuration of a space under one bound.

    It is within 1e-4 of the optimum where HiGHS proves that within its time limit, else the best one found: with some
    two hundred free matrices the proof may take longer, the configuration is then within some thousandths.

    Args:
        space: matrices, formats and fused groups.
        costs: predicted loss increase by matrix and format.
        max_bytes: least cost among configurations of at most so many bytes.
        max_cost: least bytes among configurations of at most this cost (nats per token).

    Raises:
        ConfigError: not exactly one bound is given, or no configuration of the space meets it.
    """
    if (max_bytes is None) == (max_cost is None):
        raise ConfigError("allocation takes exactly one bound, max_bytes or max_cost; give one of them")
    price, size = cost_matrix(space, costs), space.sizes.astype(np.float64)
    objective, bounded, bound = (price, size, max_bytes) if max_bytes is not None else (size, price, max_cost)
    assert bound is not None
    least = bounded.min(1).sum()
    if least > bound:
        what = f"{least / 1e6:.2f} MB" if max_bytes is not None else f"a predicted loss increase of {least:.4g}"
        given = f"{bound / 1e6:.2f} MB" if max_bytes is not None else f"{bound:.4g}"
        raise ConfigError(
            f"a bound of {given} is not feasible: the least is {what} with the formats "
            f"{', '.join(map(str, space.formats))}; raise the bound or allow more formats"
        )
    limit = np.floor(bound) + 0.5 if max_bytes is not None else bound * (1 + 1e-9)  # bytes are whole numbers
    choice, factor, floor = _bounded_choice(objective, bounded, limit, size, _GAP)
    return space.config(_settled(objective, bounded, limit, choice, factor, floor))


def near_optimal(price: NDArray[np.float64], size: NDArray[np.float64], limit: float) -> NDArray[np.int64]:
    """Return the format number of every group: nearly the least Σ price with Σ size at most `limit`.

    It takes a few milliseconds, some twenty where dynamic programming is needed: for many budgets or disturbed costs.

    Args:
        price: cost by group and format, [groups, formats].
        size: bytes, [groups, formats]; the least of every group together must meet the limit.
        limit: most bytes.
    """
    return _bounded_choice(price, size, limit, size, _NEAR)[0]


def near_optimal_each(
    price: NDArray[np.float64], size: NDArray[np.float64], limits: Sequence[float]
) -> list[NDArray[np.int64]]:
    """Return what `near_optimal` is for, for many limits at once: dynamic programming over sizes runs a single time.

    Args:
        price: cost by group and format, [groups, formats].
        size: bytes, [groups, formats].
        limits: most bytes; the least of every group together must meet each.
    """
    rows = np.arange(len(price))
    tried = least_cost_by_size(price, size.astype(np.int64))
    sizes, prices = size[rows, tried].sum(1), price[rows, tried].sum(1)
    found = []
    for limit in limits:
        choice = lagrangian_choice(price, size, limit)[0]
        best = int(np.where(sizes <= limit, prices, np.inf).argmin())
        better = sizes[best] <= limit and prices[best] < price[rows, choice].sum()
        found.append(tried[best].astype(np.int64) if better else choice)
    return found


def lagrangian_choice(
    objective: NDArray[np.float64], bounded: NDArray[np.float64], limit: float
) -> tuple[NDArray[np.int64], float, float]:
    """Return a near-optimal choice per group, in about a millisecond.

    Least Σ objective + λ·bounded for the least λ that keeps the bound, then single changes that use up what is left.

    Args:
        objective: what to make small, [groups, formats].
        bounded: what the limit counts, [groups, formats]; the least of every group together must meet it.
        limit: most Σ bounded.

    Returns:
        (format number of every group, λ of the greatest bound, that lower bound of Σ objective).
    """
    rows = np.arange(len(objective))
    unit = max(float(np.ptp(objective, 1).max()), 1e-300) / max(float(np.ptp(bounded, 1).max()), 1e-300)
    choice = bounded.argmin(1)
    factor, floor = 0.0, float(objective.min(1).sum())
    low, high = -30.0, 30.0  # log of λ over its unit
    for _ in range(60):
        middle = (low + high) / 2
        weight = np.exp(middle) * unit
        total = objective + weight * bounded
        tried = total.argmin(1)
        dual = float(total[rows, tried].sum() - weight * limit)
        if dual > floor:
            factor, floor = weight, dual
        if bounded[rows, tried].sum() <= limit:
            choice, high = tried, middle
        else:
            low = middle
    choice = choice.copy()
    for _ in range(4 * len(rows)):
        gain = objective[rows, choice][:, None] - objective
        fits = bounded - bounded[rows, choice][:, None] <= limit - bounded[rows, choice].sum()
        gain[~fits] = 0.0
        row, column = divmod(int(gain.argmax()), gain.shape[1])
        if gain[row, column] <= 0:
            break
        choice[row] = column
    return choice, factor, floor


def _exchanged(
    objective: NDArray[np.float64], bounded: NDArray[np.float64], limit: float, choice: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return a choice improved by changing two groups at once, the second giving back what the first takes."""
    choice, rows, columns = choice.copy(), np.arange(len(choice)), objective.shape[1]
    for _ in range(2 * len(rows)):
        gain = (objective[rows, choice][:, None] - objective).ravel()
        extra = (bounded - bounded[rows, choice][:, None]).ravel()
        slack = limit - bounded[rows, choice].sum()
        back = np.argsort(-extra, kind="stable")  # least given back first
        best = np.maximum.accumulate(gain[back][::-1])[::-1]  # best gain among those that give back at least so much
        place = np.searchsorted(-extra[back], extra - slack)
        total = np.where(place < len(back), gain + best[np.minimum(place, len(back) - 1)], -np.inf)
        first = int(total.argmax())
        partners = np.flatnonzero(extra <= slack - extra[first])
        partners = partners[partners // columns != first // columns]
        if not len(partners):
            break
        second = int(partners[gain[partners].argmax()])
        if gain[first] + gain[second] <= 1e-12 * abs(objective[rows, choice].sum()):
            break
        choice[[first // columns, second // columns]] = first % columns, second % columns
    return choice


def _undominated(objective: NDArray[np.float64], bounded: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which formats of each group no other one beats in both: an optimum needs no others."""
    no_worse = (objective[:, :, None] >= objective[:, None, :]) & (bounded[:, :, None] >= bounded[:, None, :])
    better = (objective[:, :, None] > objective[:, None, :]) | (bounded[:, :, None] > bounded[:, None, :])
    earlier = np.tri(objective.shape[1], k=-1, dtype=bool)  # of equal formats the first stays
    return np.asarray(~(no_worse & (better | earlier)).any(2))


def _unit(values: NDArray[np.float64]) -> float:
    """Return the largest spread of a group: HiGHS works to absolute tolerances."""
    return max(float(np.ptp(values, 1).max()), 1e-30)


def _bounded_choice(
    objective: NDArray[np.float64],
    bounded: NDArray[np.float64],
    limit: float,
    size: NDArray[np.float64],
    gap: float,
) -> tuple[NDArray[np.int64], float, float]:
    """Return a choice, and the λ and lower bound that speak for it; `size` is one of `objective` and `bounded`."""
    rows = np.arange(len(objective))
    choice, factor, floor = lagrangian_choice(objective, bounded, limit)
    choice = _exchanged(objective, bounded, limit, choice)
    value = float(objective[rows, choice].sum())
    if value - floor > gap * abs(value):
        price = objective if size is bounded else bounded
        tried = least_cost_by_size(price, size.astype(np.int64))
        tried = tried[bounded[rows, tried].sum(1) <= limit]
        if len(tried):
            other = tried[objective[rows, tried].sum(1).argmin()].astype(np.int64)
            other = _exchanged(objective, bounded, limit, other)
            if objective[rows, other].sum() < value:
                choice = other
    return choice, factor, floor


def _settled(
    objective: NDArray[np.float64],
    bounded: NDArray[np.float64],
    limit: float,
    choice: NDArray[np.int64],
    factor: float,
    floor: float,
) -> NDArray[np.int64]:
    """Return the format of every group: least objective with the sum of `bounded` at most `limit`, from a choice."""
    rows = np.arange(len(objective))
    value = float(objective[rows, choice].sum())
    if value - floor <= 0.5 * _GAP * abs(value):
        return choice
    # A configuration with this choice in this group costs at least floor + reduced.
    reduced = objective + factor * bounded
    reduced = reduced - reduced.min(1, keepdims=True)
    kept = _undominated(objective, bounded) & (floor + reduced <= value + 1e-9 * abs(value))
    kept[rows, choice] = True
    for bound in (limit, limit - 3e-6 * _unit(bounded)):  # HiGHS may overstep a row by 1e-6 of its units
        found = _highs(objective, bounded, bound, kept)
        if found is None:
            break
        if bounded[rows, found].sum() <= limit:
            return found if objective[rows, found].sum() <= value else choice
    return choice


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Send C's standard output nowhere: HiGHS has a stray printf, which would end up behind the JSON of --json."""
    libc = ctypes.CDLL(None)
    libc.fflush(None)
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _highs(
    objective: NDArray[np.float64], bounded: NDArray[np.float64], limit: float, kept: NDArray[np.bool_]
) -> NDArray[np.int64] | None:
    """Return HiGHS's format of every group among those `kept`, or None where it found none in time."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    groups = np.nonzero(kept)[0]
    one_each = csr_array((np.ones(len(groups)), (groups, np.arange(len(groups)))))
    with _silence():
        solution = milp(
            objective[kept] / _unit(objective),
            integrality=np.ones(len(groups), dtype=np.int64),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint((bounded[kept] / _unit(bounded))[None, :], -np.inf, limit / _unit(bounded)),
            ],
            options={"mip_rel_gap": 0.5 * _GAP, "time_limit": _SECONDS},
        )
    if solution.x is None:
        return None
    share = np.zeros(kept.shape)
    share[kept] = solution.x
    return np.asarray(share.argmax(1))
