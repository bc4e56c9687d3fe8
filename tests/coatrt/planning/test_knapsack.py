"""Allocations against every configuration of a small space, and against HiGHS on larger ones."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from coatrt.configs.space import ConfigSpace
from coatrt.errors import ConfigError
from coatrt.models.matrices import ModelMatrices, matrices_of
from coatrt.planning.knapsack import cost_matrix, lagrangian_choice, near_optimal
from coatrt.quantization.weight_format import WeightFormat
from support.knapsack import least_price

pytestmark = pytest.mark.fast

FORMATS = tuple(map(WeightFormat.parse, ("nf2-g64", "nf3-g64", "int4-g64", "int8")))


@pytest.fixture(scope="module")
def model() -> ModelMatrices:
    shapes = {"model.embed_tokens.weight": (128, 64)}
    for layer in range(2):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.q_proj.weight": (64, 64), f"{at}.self_attn.k_proj.weight": (32, 64)}
        shapes |= {f"{at}.mlp.down_proj.weight": (64, 192)}
    return matrices_of(shapes, tied=True)


def costs(model: ModelMatrices, seed: int) -> dict[str, dict[str, float]]:
    rng = np.random.default_rng(seed)
    return {name: {str(fmt): float(rng.exponential() / 4**fmt.bits) for fmt in FORMATS} for name in model.names}


def allocated(price: NDArray[np.float64], size: NDArray[np.float64], limit: float) -> float:
    """Return the cost of the allocation, which is within the limit."""
    rows, choice = np.arange(len(price)), near_optimal(price, size, limit)
    assert size[rows, choice].sum() <= limit
    return float(price[rows, choice].sum())


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_the_optimum_of_a_small_space_is_found(model: ModelMatrices, seed: int, ordered: bool) -> None:
    """With costs in no order many formats are dominated; with many ties too."""
    space, rng = ConfigSpace(model, FORMATS), np.random.default_rng(seed)
    unordered = {name: {str(fmt): float(rng.integers(1, 6)) for fmt in FORMATS} for name in model.names}
    price, size = cost_matrix(space, costs(model, seed) if ordered else unordered), space.sizes.astype(float)
    rows = np.arange(len(space.groups))
    assert len(rows) == 5  # embedding; q and k; down; twice
    choices = np.array(list(itertools.product(range(4), repeat=5)))
    every_price, every_size = price[rows, choices].sum(1), size[rows, choices].sum(1)
    for share in (0.0, 0.1, 0.35, 0.6, 0.9, 1.0):
        budget = float(every_size.min() + share * (every_size.max() - every_size.min()))
        best = every_price[every_size <= budget].min()
        assert least_price(price, size, budget) == pytest.approx(best)
        assert allocated(price, size, budget) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_allocations_of_many_groups_are_within_a_hundredth_of_the_optimum(seed: int) -> None:
    rng, count = np.random.default_rng(seed), 60
    widths = np.array([2.25, 2.5, 3.25, 3.5, 4.25, 4.5, 8.0])
    size = np.rint(rng.uniform(0.5, 1.5, (count, 1)) * 40_960 * widths / 8)
    price = rng.exponential(size=(count, len(widths)))  # the last two kinds: in no order, and with some matrices heavy
    price = [price / 4.0**widths, price, price * rng.exponential(size=(count, 1)) / 4.0**widths][seed % 3]
    low, high = size.min(1).sum(), size.max(1).sum()
    for share in (0.1, 0.35, 0.6, 0.9):
        budget = float(low + share * (high - low))
        best = least_price(price, size, budget)
        assert allocated(price, size, budget) <= best * 1.01


def test_the_exact_size_of_a_configuration_is_a_feasible_budget(model: ModelMatrices) -> None:
    space = ConfigSpace(model, FORMATS)
    price, size = cost_matrix(space, costs(model, 1)), space.sizes.astype(float)
    smallest, largest = space.uniform("nf2-g64"), space.uniform("int8")
    assert space.config(near_optimal(price, size, smallest.nbytes(model))) == smallest
    assert space.config(near_optimal(price, size, 1e9)) == largest


def test_a_table_that_lacks_a_matrix_is_refused(model: ModelMatrices) -> None:
    with pytest.raises(ConfigError, match=r"no sensitivity of model\.embed_tokens in nf2-g64"):
        cost_matrix(ConfigSpace(model, FORMATS), {})


@pytest.mark.parametrize("seed", range(5))
def test_the_lagrangian_bounds_the_optimum_from_both_sides(model: ModelMatrices, seed: int) -> None:
    space, table = ConfigSpace(model, FORMATS), costs(model, seed)
    price, size, rows = cost_matrix(space, table), space.sizes.astype(float), np.arange(len(space.groups))
    choices = np.array(list(itertools.product(range(4), repeat=len(rows))))
    every_price, every_size = price[rows, choices].sum(1), size[rows, choices].sum(1)
    for limit in np.linspace(every_size.min(), every_size.max(), 9):
        choice, floor = lagrangian_choice(price, size, limit)
        best = every_price[every_size <= limit].min()
        assert floor <= best * (1 + 1e-9) <= price[rows, choice].sum() * (1 + 2e-9)
        assert size[rows, choice].sum() <= limit


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [2.45, 2.5, 2.6, 3.0])
def test_a_table_of_a_fifth_of_the_model_is_no_trap(seed: int, bits: float) -> None:
    """One heavy choice: below its next format no multiplier reaches it, and single changes fill up with the rest."""
    rng, count = np.random.default_rng(seed), 60
    weights = np.array([count / 4, *rng.uniform(0.5, 1.5, count)])
    widths = np.array([2.25, 3.25, 4.25, 8.0])
    size = np.rint(1000 * weights[:, None] * widths / 8)
    price = np.array([8.0, *rng.exponential(size=count)])[:, None] / 4.0 ** (widths - 2.25)
    limit = float(bits * 1000 * weights.sum() / 8)
    exact = least_price(price, size, limit, 1e-3)
    assert allocated(price, size, limit) <= exact * 1.02
    assert allocated(price, size, float(size.max(1).sum())) == pytest.approx(price.min(1).sum())
