import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coatrt.configs.space import ConfigSpace
from coatrt.errors import ConfigError
from coatrt.models.matrices import Matrix, ModelMatrices
from coatrt.planning.knapsack import allocate, cost_matrix
from coatrt.quantization.weight_format import WeightFormat

FORMATS = tuple(map(WeightFormat.parse, ["int8", "int4-g64", "nf3-g64", "nf2-g64"]))


def big_model(layers=12):
    rows = [Matrix("model.embed_tokens", 4096, 512)]
    for i in range(layers):
        p = f"model.layers.{i}."
        rows += [Matrix(f"{p}self_attn.{k}_proj", 512, 512) for k in "qkvo"]
        rows += [
            Matrix(f"{p}mlp.gate_proj", 1024, 512),
            Matrix(f"{p}mlp.up_proj", 1024, 512),
            Matrix(f"{p}mlp.down_proj", 512, 1024),
        ]
    return ModelMatrices(tuple(rows), tied=True)


SPACE = ConfigSpace(big_model(), FORMATS)


@settings(max_examples=60, deadline=None)
@given(st.floats(2.26, 8.0), st.integers(0, 1000))
def test_budgeted_samples_meet_the_budget_and_keep_groups_together(bits, seed):
    config = SPACE.sample_budgeted(np.random.default_rng(seed), bits)
    assert abs(config.average_bits(SPACE.model) - bits) <= 0.15
    assert all(len({config[name] for name in group}) == 1 for group in SPACE.groups)


def test_budgeted_samples_differ_and_reach_the_extremes():
    rng = np.random.default_rng(0)
    assert len({SPACE.sample_budgeted(rng, 4.0).hash for _ in range(20)}) == 20
    assert SPACE.sample_budgeted(rng, 0) == SPACE.uniform("nf2-g64")
    assert SPACE.sample_budgeted(rng, 99) == SPACE.uniform("int8")


def small_space():
    rows = tuple(Matrix(f"model.layers.{i}.self_attn.o_proj", 64 * (i + 1), 64) for i in range(5))
    return ConfigSpace(ModelMatrices(rows, tied=True), FORMATS)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.0, 1.0))
def test_allocation_equals_exhaustive_search(seed, fraction):
    space, rng = small_space(), np.random.default_rng(seed)
    costs = {name: {str(f): float(rng.random()) for f in FORMATS} for name in space.model.names}
    low, high = space.sizes.min(1).sum(), space.sizes.max(1).sum()
    budget = float(low + fraction * (high - low))
    table = cost_matrix(space, costs)
    rows = np.arange(5)
    best = min(
        table[rows, list(choice)].sum()
        for choice in itertools.product(range(4), repeat=5)
        if space.sizes[rows, list(choice)].sum() <= budget
    )
    config = allocate(space, costs, max_bytes=budget)
    assert config.nbytes(space.model) <= budget
    got = sum(costs[name][str(config[name])] for name in space.model.names)
    assert got <= best * (1 + 2e-4) + 1e-9


def test_allocation_by_cost_takes_the_fewest_bytes():
    space = small_space()
    costs = {name: {"int8": 0.0, "int4-g64": 0.1, "nf3-g64": 0.4, "nf2-g64": 2.0} for name in space.model.names}
    assert allocate(space, costs, max_cost=0.5).counts == {"int4-g64": 5}
    assert allocate(space, costs, max_cost=0.0).counts == {"int8": 5}


def test_infeasible_and_incomplete_requests_are_refused():
    space = small_space()
    costs = {name: {str(f): 0.0 for f in FORMATS} for name in space.model.names}
    with pytest.raises(ConfigError, match="not feasible"):
        allocate(space, costs, max_bytes=10)
    with pytest.raises(ConfigError, match="exactly one"):
        allocate(space, costs)
    with pytest.raises(ConfigError, match="no sensitivity"):
        allocate(space, {}, max_bytes=1e9)
