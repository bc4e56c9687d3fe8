"""Allocation: the configuration of least predicted cost under a budget, a multiple-choice knapsack solved by HiGHS."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from coatrt.config import QuantConfig
from coatrt.errors import ConfigError
from coatrt.space import ConfigSpace

__all__ = ["CostTable", "allocate", "cost_matrix"]

CostTable = Mapping[str, Mapping[str, float]]
"""Matrix name → format text → predicted loss increase in nats per token."""


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
    choice = _solve(objective, bounded, limit)
    rows = np.arange(len(choice))
    if bounded[rows, choice].sum() > limit:
        # HiGHS may overstep a row by 1e-6 of its units: ask again with that much less.
        choice = _solve(objective, bounded, max(limit - 3e-6 * _unit(bounded), least))
    return space.config(choice)


def _unit(values: NDArray[np.float64]) -> float:
    """Return the largest spread of a group: HiGHS works to absolute tolerances."""
    return max(float(np.ptp(values, 1).max()), 1e-30)


def _solve(objective: NDArray[np.float64], bounded: NDArray[np.float64], limit: float) -> NDArray[np.int64]:
    """Return the format of every group: least objective with the sum of `bounded` at most `limit`."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    groups, formats = objective.shape
    one_each = csr_array(
        (np.ones(groups * formats), (np.repeat(np.arange(groups), formats), np.arange(groups * formats)))
    )
    solution = milp(
        (objective / _unit(objective)).ravel(),
        integrality=np.ones(groups * formats),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint((bounded / _unit(bounded)).ravel()[None, :], -np.inf, limit / _unit(bounded)),
        ],
        options={"mip_rel_gap": 1e-4, "time_limit": 10},
    )
    if solution.x is None:
        raise ConfigError(f"allocation found no configuration ({solution.message}); loosen the bound")
    return np.asarray(solution.x.reshape(groups, formats).argmax(1))
