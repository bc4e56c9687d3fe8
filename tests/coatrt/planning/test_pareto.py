"""Fronts against brute force, areas against inclusion–exclusion and counted cells."""

import itertools

import numpy as np
import pytest

from coatrt.planning.pareto import hypervolume, pareto_indices

pytestmark = pytest.mark.fast


def points(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 12, (count, 2)).astype(float)  # small integers: many ties


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_nothing_beats(seed: int) -> None:
    array = points(seed, 15)
    kept = [
        i
        for i, p in enumerate(array)
        if not any((q <= p).all() and ((q < p).any() or j < i) for j, q in enumerate(array))
    ]
    found = pareto_indices(array)
    assert sorted(found.tolist()) == kept
    assert (np.diff(array[found, 0]) > 0).all()
    assert (np.diff(array[found, 1]) < 0).all()


@pytest.mark.parametrize("seed", range(10))
def test_the_area_is_that_of_inclusion_and_exclusion(seed: int) -> None:
    array, reference = np.random.default_rng(seed).random((7, 2)), (0.9, 0.8)
    total = 0.0
    for size in range(1, len(array) + 1):
        for chosen in itertools.combinations(array, size):
            corner = np.max(chosen, 0)  # the rectangles of all of them have this corner in common
            total += (-1) ** (size + 1) * np.prod(np.maximum(np.subtract(reference, corner), 0))
    assert hypervolume(array, reference) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_the_area_is_the_number_of_dominated_cells(seed: int) -> None:
    array, (x, y) = points(seed, 12), (10, 11)
    cells = sum(any(p[0] <= i and p[1] <= j for p in array) for i in range(x) for j in range(y))
    assert hypervolume(array, (x, y)) == cells


def test_points_beyond_the_reference_and_no_points_count_nothing() -> None:
    assert hypervolume([], (1, 1)) == 0
    assert hypervolume([(2, 0), (0, 2), (1, 0)], (1, 1)) == 0
    assert hypervolume([(0.25, 0.5)], (1, 1)) == pytest.approx(0.375)
    assert len(pareto_indices([])) == 0
