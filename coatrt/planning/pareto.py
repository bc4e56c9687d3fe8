"""Pareto front and hypervolume of two objectives to minimize, such as bits and loss."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["hypervolume", "pareto_indices"]


def pareto_indices(points: ArrayLike) -> NDArray[np.int64]:
    """Return the indices of the points [n, 2] on the front, both coordinates minimized, ordered by the first.

    Of equal points only the first is on the front.
    """
    array = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    order = np.lexsort((np.arange(len(array)), array[:, 1], array[:, 0]))
    second = array[order, 1]
    lowest = np.concatenate([[np.inf], np.minimum.accumulate(second)[:-1]]) if len(order) else second
    return np.asarray(order[second < lowest], dtype=np.int64)


def hypervolume(points: ArrayLike, reference: tuple[float, float]) -> float:
    """Return the area between the points and a reference point that at least one of them dominates.

    The closed form for two objectives: the front by its first coordinate, one rectangle per point.

    Args:
        points: [n, 2], both coordinates minimized; those beyond the reference count nothing.
        reference: the worst value of both coordinates that counts.
    """
    array = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    array = array[(array < np.asarray(reference)).all(1)]
    front = array[pareto_indices(array)]
    above = np.concatenate([[reference[1]], front[:-1, 1]]) if len(front) else front[:, 1]
    return float(((reference[0] - front[:, 0]) * (above - front[:, 1])).sum())
