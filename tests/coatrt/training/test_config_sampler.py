"""The configurations of a training step: their budgets, and how near they are to what a planner chooses."""

from pathlib import Path

import numpy as np

from coatrt.adapter.adapter import Adapter
from coatrt.configs.config import QuantConfig
from coatrt.planning.knapsack import cost_matrix
from coatrt.training.config_sampler import TrainingSampler
from support.knapsack import least_price


def test_sampler_keeps_budgets_and_draws_few_and_many_bits_in_turn(tiny_adapter: Path) -> None:
    adapter = Adapter.from_pretrained(tiny_adapter)
    sampler = TrainingSampler(adapter.description.space, adapter.description.sensitivity.costs, 4.5, 7.0, seed=1)
    bits = np.array([[c.average_bits(adapter.description.model) for c in sampler.draw(step)] for step in range(40)])
    step = (
        8 * adapter.description.space.sizes.max() / adapter.description.model.parameters
    )  # the coarsest change a group can make
    few, many = bits[::2, 0], bits[1::2, 0]
    for side, low, high in ((few, 4.5, 5.0), (many, 6.5, 7.0)):
        assert (side <= high + 0.05).all()
        assert (side >= low - step).all()
        assert side.std() > 0.08
    assert bits.shape == (40, 2)
    assert bits[:, 1].min() < 5.0
    assert bits[:, 1].max() > 6.5
    assert (bits <= 7.0 + 0.05).all()
    assert sampler.draw(7) == sampler.draw(7)
    assert sampler.draw(7) != sampler.draw(9)


def test_planner_like_draws_are_near_the_knapsack_optimum(tiny_adapter: Path) -> None:
    adapter = Adapter.from_pretrained(tiny_adapter)
    space, costs = adapter.description.space, adapter.description.sensitivity.costs
    sampler = TrainingSampler(space, costs, 4.5, 7.0)
    price = cost_matrix(space, costs)

    def total(config: QuantConfig) -> float:
        return float(sum(price[i, space.formats.index(config[group[0]])] for i, group in enumerate(space.groups)))

    for bits in (4.6, 5.0, 6.0):
        best = least_price(price, space.sizes.astype(float), bits * space.model.parameters / 8)
        drawn = sampler.plan_like(None, bits)
        assert drawn.average_bits(space.model) <= bits
        assert best <= total(drawn) * (1 + 1e-3)
        assert total(drawn) <= total(space.uniform("nf3-g32"))
