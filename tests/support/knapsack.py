"""The optimum of a multiple-choice knapsack by HiGHS, the reference for coatrt's own allocations."""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

__all__ = ["least_price"]


def least_price(price: NDArray[np.float64], size: NDArray[np.float64], limit: float, gap: float = 1e-6) -> float:
    """Return the least Σ price of one format per group with Σ size at most `limit`.

    Args:
        price: cost by group and format, [groups, formats].
        size: bytes, [groups, formats].
        limit: largest total size in bytes.
        gap: relative distance from the optimum.
    """
    rows, unit = np.arange(len(price)), float(np.ptp(price, 1).max())  # HiGHS works to absolute tolerances
    one_each = csr_array(np.kron(np.eye(len(price)), np.ones(price.shape[1])))
    solution = milp(
        price.ravel() / unit,
        integrality=np.ones(price.size),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size.ravel()[None], -np.inf, limit)],
        options={"mip_rel_gap": gap},
    )
    assert solution.status == 0, solution.message
    choice = solution.x.reshape(price.shape).argmax(1)
    assert size[rows, choice].sum() <= limit
    return float(price[rows, choice].sum())
