"""The configurations of a training step: their budgets, and how near they are to what a planner chooses."""

from pathlib import Path

import numpy as np

from coatrt.adapter.adapter import Adapter
from coatrt.configs.config import QuantConfig
from coatrt.planning.knapsack import cost_matrix
from coatrt.training.config_sampler import TrainingSampler
from support.knapsack import least_price


def test_sampler_draws_two_budgets_evenly_from_the_range(tiny_adapter: Path) -> None:
    adapter = Adapter.from_pretrained(tiny_adapter)
    sampler = TrainingSampler(adapter.description.space, adapter.description.sensitivity.costs, 4.5, 7.0, seed=1)
    bits = np.array([[c.average_bits(adapter.description.model) for c in sampler.draw(step)] for step in range(200)])
    step = (
        8 * adapter.description.space.sizes.max() / adapter.description.model.parameters
    )  # the coarsest change a group can make
    assert bits.shape == (200, 2)
    assert (bits <= 7.0 + 0.05).all()
    assert (bits >= 4.5 - step).all()
    for drawn in bits.T:
        thirds = np.histogram(drawn, [0, 4.5 + 2.5 / 3, 4.5 + 5 / 3, 8])[0] / len(drawn)
        assert (abs(thirds - 1 / 3) < 0.12).all(), thirds
    assert abs(np.corrcoef(bits.T)[0, 1]) < 0.25  # one says nothing about the other
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
