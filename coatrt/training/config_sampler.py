"""Which configurations training sees: in every step one of few or of many bits, and one of any."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from coatrt.configs.config import QuantConfig
from coatrt.configs.space import ConfigSpace
from coatrt.planning.knapsack import CostTable, cost_matrix, near_optimal

__all__ = ["TrainingSampler"]

_SIDE = 0.2  # of the budget range: as wide are the two parts that the first configuration of a step comes from
_PLANNED = 0.75  # share of draws that a planner could choose
_JITTER = 0.7  # standard deviation of the noise on the log of a cost


@dataclass(frozen=True)
class TrainingSampler:
    """Draws the two configurations of a training step, a function of (seed, step) alone.

    The first has a budget from the lowest fifth of the range in every other step, and from the highest fifth in the
    steps between (docs/method.md compares draws); the second has any. Budgets are drawn first: independent formats per
    matrix would concentrate at the mean budget and starve the ends (LLM-QFA, ACL 2025). Three quarters of the draws are
    what a planner could choose: the allocation of least cost under the budget, its costs disturbed; the others are
    random maps of that budget.

    Args:
        space: matrices and formats.
        costs: sensitivities.
        low: lowest budget in bits per weight, not below the least bits of the space.
        high: highest budget, not above the most.
        seed: of the draws.
    """

    space: ConfigSpace
    costs: CostTable
    low: float
    high: float
    seed: int = 0

    @cached_property
    def _prices(self) -> NDArray[np.float64]:
        """What each format costs each group."""
        return cost_matrix(self.space, self.costs)

    def draw(self, step: int) -> list[QuantConfig]:
        """Return the two configurations of a step."""
        rng = np.random.default_rng([self.seed, step])
        width, configs = _SIDE * (self.high - self.low), []
        side = (self.high - width, self.high) if step % 2 else (self.low, self.low + width)
        for low, high in (side, (self.low, self.high)):
            bits = float(rng.uniform(low, high))
            planned = rng.random() < _PLANNED
            configs.append(self.plan_like(rng, bits) if planned else self.space.sample_budgeted(rng, bits))
        return configs

    def plan_like(self, rng: np.random.Generator | None, bits: float) -> QuantConfig:
        """Return a near-optimal allocation of at most `bits`, in milliseconds.

        Args:
            rng: disturbs the costs; None leaves them as they are.
            bits: average bits per weight.
        """
        price = self._prices
        if rng is not None:
            price = price * np.exp(_JITTER * rng.normal(size=price.shape))
        budget = max(bits * self.space.model.parameters / 8 + 0.5, float(self.space.sizes.min(1).sum()))
        return self.space.config(near_optimal(price, self.space.sizes.astype(np.float64), budget))
