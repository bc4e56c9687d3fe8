"""The configurations of training: two of any size in every step."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from coatrt.configs.config import QuantConfig
from coatrt.configs.space import ConfigSpace
from coatrt.planning.knapsack import CostTable, cost_matrix, near_optimal

__all__ = ["TrainingSampler"]

_COUNT = 2  # configurations of a step
_PLAN_SHARE = 0.75  # share of draws that are allocations like a planner's
_JITTER = 0.7  # standard deviation of the noise on the log of a cost


@dataclass(frozen=True)
class TrainingSampler:
    """Draws the two configurations of a training step; the result depends on (seed, step) alone.

    Budgets are drawn first, evenly from the range (docs/evidence/results.md compares draws): independent formats per
    matrix would concentrate at the mean budget (LLM-QFA, ACL 2025). Three quarters of the draws are like a planner's
    choice, the allocation of least cost under the budget with noise on the costs; the others are random configurations
    of that budget.

    Args:
        space: matrices and formats.
        costs: sensitivities.
        low: lowest budget in bits per weight, at least `space.min_bits`.
        high: highest budget, at most `space.max_bits`.
        seed: seed of the draws.
    """

    space: ConfigSpace
    costs: CostTable
    low: float
    high: float
    seed: int = 0

    @cached_property
    def _prices(self) -> NDArray[np.float64]:
        """Cost of each format for each group, [groups, formats]."""
        return cost_matrix(self.space, self.costs)

    def draw(self, step: int) -> list[QuantConfig]:
        """Return the two configurations of a step."""
        rng, configs = np.random.default_rng([self.seed, step]), []
        for _ in range(_COUNT):
            bits = float(rng.uniform(self.low, self.high))
            is_allocated = rng.random() < _PLAN_SHARE
            configs.append(self.plan_like(rng, bits) if is_allocated else self.space.sample(rng, bits))
        return configs

    def plan_like(self, rng: np.random.Generator | None, bits: float) -> QuantConfig:
        """Return a near-optimal allocation of at most `bits`, in milliseconds.

        Args:
            rng: adds noise to the costs; None: no noise.
            bits: average bits per weight.
        """
        price = self._prices
        if rng is not None:
            price = price * np.exp(_JITTER * rng.normal(size=price.shape))
        budget = max(bits * self.space.model.parameters / 8 + 0.5, float(self.space.sizes.min(1).sum()))
        return self.space.config(near_optimal(price, self.space.sizes.astype(np.float64), budget))
