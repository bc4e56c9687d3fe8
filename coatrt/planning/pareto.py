"""Two things to make small, such as bits and loss: which points no other beats, and the area they dominate."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["hypervolume", "pareto_indices"]


def pareto_indices(points: ArrayLike) -> NDArray[np.int64]:
    """Return which points [n, 2] no other equals or beats in both coordinates, to be made small, by the first of them.

    Of equal points the first stays.
    """
    array = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    order = np.lexsort((np.arange(len(array)), array[:, 1], array[:, 0]))
    second = array[order, 1]
    lowest = np.concatenate([[np.inf], np.minimum.accumulate(second)[:-1]]) if len(order) else second
    return np.asarray(order[second < lowest], dtype=np.int64)


def hypervolume(points: ArrayLike, reference: tuple[float, float]) -> float:
    """Return the area between the points and a reference point: what at least one of them dominates.

    The closed form for two objectives: the front by its first coordinate, one rectangle per point.

    Args:
        points: [n, 2], both to be made small; those that do not beat the reference in both count nothing.
        reference: the worst of both coordinates that is worth anything.
    """
    array = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    array = array[(array < np.asarray(reference)).all(1)]
    front = array[pareto_indices(array)]
    above = np.concatenate([[reference[1]], front[:-1, 1]]) if len(front) else front[:, 1]
    return float(((reference[0] - front[:, 0]) * (above - front[:, 1])).sum())
