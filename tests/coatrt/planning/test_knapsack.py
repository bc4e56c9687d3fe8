"""Allocation against every configuration of a small space."""

import ctypes
import itertools

import numpy as np
import pytest

from coatrt.configs.space import ConfigSpace
from coatrt.errors import ConfigError
from coatrt.models.matrices import ModelMatrices, matrices_of
from coatrt.planning.knapsack import (
    _silence,
    _undominated,
    allocate,
    cost_matrix,
    lagrangian_choice,
    near_optimal,
    near_optimal_each,
)
from coatrt.quantization.weight_format import WeightFormat

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


@pytest.mark.parametrize("seed", range(5))
def test_the_optimum_is_found_under_either_bound(model: ModelMatrices, seed: int) -> None:
    space, table = ConfigSpace(model, FORMATS), costs(model, seed)
    price, groups = cost_matrix(space, table), len(space.groups)
    assert groups == 5  # embedding; q and k; down; twice
    choices = np.array(list(itertools.product(range(4), repeat=groups)))
    every_price = price[np.arange(groups), choices].sum(1)
    every_size = space.sizes[np.arange(groups), choices].sum(1)
    for share in (0.1, 0.35, 0.6, 0.9):
        budget = float(every_size.min() + share * (every_size.max() - every_size.min()))
        found = allocate(space, table, max_bytes=budget)
        assert found.nbytes(model) <= budget
        best = every_price[every_size <= budget].min()
        value = sum(price[i, FORMATS.index(found[group[0]])] for i, group in enumerate(space.groups))
        assert value <= best * (1 + 1.01e-4)
        bound = float(best)
        cheap = allocate(space, table, max_cost=bound)
        assert cheap.nbytes(model) <= every_size[every_price <= bound * (1 + 1e-12)].min() * (1 + 1.01e-4)


def test_the_exact_size_of_a_configuration_is_a_feasible_budget(model: ModelMatrices) -> None:
    space, table = ConfigSpace(model, FORMATS), costs(model, 1)
    assert allocate(space, table, max_bytes=space.uniform("nf2-g64").nbytes(model)) == space.uniform("nf2-g64")
    assert allocate(space, table, max_bytes=1e9).counts == {"int8": 7}


def test_bounds_that_cannot_be_met_say_what_could(model: ModelMatrices) -> None:
    space, table = ConfigSpace(model, FORMATS), costs(model, 1)
    with pytest.raises(ConfigError, match=r"not feasible: the least is 0\.01 MB with the formats nf2-g64"):
        allocate(space, table, max_bytes=10)
    with pytest.raises(ConfigError, match="not feasible: the least is a predicted loss"):
        allocate(space, table, max_cost=0)
    with pytest.raises(ConfigError, match="exactly one bound"):
        allocate(space, table)
    with pytest.raises(ConfigError, match=r"no sensitivity of model\.embed_tokens in nf2-g64"):
        allocate(space, {}, max_bytes=1e9)


@pytest.mark.parametrize("seed", range(5))
def test_formats_that_others_beat_change_nothing(model: ModelMatrices, seed: int) -> None:
    """Costs without order: many formats are dominated. With and without them the optimum is that of brute force."""
    space, rng = ConfigSpace(model, FORMATS), np.random.default_rng(seed)
    table = {name: {str(fmt): float(rng.integers(1, 6)) for fmt in FORMATS} for name in model.names}  # many ties
    price, size, rows = cost_matrix(space, table), space.sizes, np.arange(len(space.groups))
    kept = _undominated(price, size.astype(float))
    for row in rows:
        for i in range(len(FORMATS)):
            beaten = any(
                price[row, j] <= price[row, i]
                and size[row, j] <= size[row, i]
                and ((price[row, j], size[row, j]) != (price[row, i], size[row, i]) or j < i)
                for j in range(len(FORMATS))
                if j != i
            )
            assert kept[row, i] == (not beaten)
    choices = np.array(list(itertools.product(range(4), repeat=len(rows))))
    every_price, every_size = price[rows, choices].sum(1), size[rows, choices].sum(1)
    for budget in np.linspace(every_size.min(), every_size.max(), 7):
        found = allocate(space, table, max_bytes=budget)
        value = sum(price[i, FORMATS.index(found[group[0]])] for i, group in enumerate(space.groups))
        assert value == pytest.approx(every_price[every_size <= budget].min())


@pytest.mark.parametrize("seed", range(5))
def test_the_lagrangian_bounds_the_optimum_from_both_sides(model: ModelMatrices, seed: int) -> None:
    space, table = ConfigSpace(model, FORMATS), costs(model, seed)
    price, size, rows = cost_matrix(space, table), space.sizes.astype(float), np.arange(len(space.groups))
    choices = np.array(list(itertools.product(range(4), repeat=len(rows))))
    every_price, every_size = price[rows, choices].sum(1), size[rows, choices].sum(1)
    for limit in np.linspace(every_size.min(), every_size.max(), 9):
        choice, factor, floor = lagrangian_choice(price, size, limit)
        best = every_price[every_size <= limit].min()
        assert floor <= best * (1 + 1e-9) <= price[rows, choice].sum() * (1 + 2e-9)
        assert size[rows, choice].sum() <= limit
        assert factor >= 0


def test_native_code_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS has a stray printf; C keeps what it printed in a buffer of its own until it is flushed."""
    libc = ctypes.CDLL(None)
    with _silence():
        libc.puts(b"stray")
    libc.puts(b"after")
    libc.fflush(None)
    assert capfd.readouterr().out == "after\n"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [2.45, 2.5, 2.6, 3.0])
def test_a_table_of_a_fifth_of_the_model_is_no_trap(seed: int, bits: float) -> None:
    """One heavy choice: below its next format no multiplier reaches it, and single changes fill up with the rest."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    rng, count = np.random.default_rng(seed), 60
    weights = np.array([count / 4, *rng.uniform(0.5, 1.5, count)])
    widths = np.array([2.25, 3.25, 4.25, 8.0])
    size = np.rint(1000 * weights[:, None] * widths / 8)
    price = np.array([8.0, *rng.exponential(size=count)])[:, None] / 4.0 ** (widths - 2.25)
    limit = float(bits * 1000 * weights.sum() / 8)
    choice = near_optimal(price, size, limit)
    rows = np.arange(len(size))
    assert size[rows, choice].sum() <= limit
    exact = milp(
        price.ravel(),
        integrality=np.ones(price.size),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(np.kron(np.eye(len(rows)), np.ones(4)), 1, 1),
            LinearConstraint(size.ravel()[None], -np.inf, limit),
        ],
        options={"mip_rel_gap": 1e-3},
    )
    assert price[rows, choice].sum() <= exact.fun * 1.02
    other, roomy = near_optimal_each(price, size, [limit, float(size.max(1).sum())])
    assert size[rows, other].sum() <= limit
    assert price[rows, other].sum() <= exact.fun * 1.03
    assert price[rows, roomy].sum() == pytest.approx(price.min(1).sum())
