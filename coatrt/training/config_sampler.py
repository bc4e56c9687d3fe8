"""Which configurations training sees: one of few or of many bits in every step, and any beside it."""

from dataclasses import dataclass

import numpy as np

from coatrt.configs.config import QuantConfig
from coatrt.configs.space import ConfigSpace
from coatrt.errors import ConfigError
from coatrt.planning.knapsack import CostTable, cost_matrix, near_optimal

__all__ = ["TrainingSampler"]

_SIDE = 0.2  # of the budget range: as wide are the two parts that the first configuration of a step comes from
_JITTER = 0.7  # standard deviation of the noise on the log of a cost


@dataclass(frozen=True)
class TrainingSampler:
    """Draws the configurations of a training step, a function of (seed, step) alone.

    The first of several has a budget from the lowest fifth of the range in every other step, and from the highest fifth
    in the steps between (docs/method.md compares draws); the others have any. Budgets are drawn first: independent
    formats per matrix would concentrate at the mean budget and starve the ends (LLM-QFA, ACL 2025). A share of the
    draws is what a planner could choose: the allocation of least cost under the budget, its costs disturbed; the others
    are random maps of that budget.

    Args:
        space: matrices and formats.
        costs: sensitivities.
        low: lowest budget in bits per weight.
        high: highest budget.
        planned: share of planner-like draws, 0 to 1.
        seed: of the draws.

    Raises:
        ConfigError: the range is empty or outside of what the formats allow.
    """

    space: ConfigSpace
    costs: CostTable
    low: float
    high: float
    planned: float = 0.75
    seed: int = 0

    def __post_init__(self) -> None:
        least, most = self.space.min_bits, self.space.max_bits
        if not least - 1e-9 <= self.low <= self.high <= most + 1e-9:
            raise ConfigError(
                f"training budgets of {self.low:g} to {self.high:g} bits are given; the formats allow {least:.3f} to "
                f"{most:.3f}; choose a range inside"
            )
        if not 0 <= self.planned <= 1:
            raise ConfigError(f"a share of {self.planned} planned configurations is given; give 0 to 1")

    def draw(self, step: int, count: int) -> list[QuantConfig]:
        """Return the configurations of a step.

        Args:
            step: number of the step.
            count: configurations, at least 1.
        """
        rng = np.random.default_rng([self.seed, step])
        configs: list[QuantConfig] = []
        while len(configs) < count:
            low, high = (self.low, self.high) if configs or count == 1 else self._side(step)
            bits = float(rng.uniform(low, high))
            planned = rng.random() < self.planned
            configs.append(self.plan_like(rng, bits) if planned else self.space.sample_budgeted(rng, bits))
        return configs

    def _side(self, step: int) -> tuple[float, float]:
        """Return the lowest fifth of the range in even steps, the highest in odd ones."""
        width = _SIDE * (self.high - self.low)
        return (self.high - width, self.high) if step % 2 else (self.low, self.low + width)

    def plan_like(self, rng: np.random.Generator | None, bits: float) -> QuantConfig:
        """Return a near-optimal allocation of at most `bits`, in milliseconds.

        Args:
            rng: disturbs the costs; None leaves them as they are.
            bits: average bits per weight.
        """
        price = cost_matrix(self.space, self.costs)
        if rng is not None:
            price = price * np.exp(_JITTER * rng.normal(size=price.shape))
        budget = max(bits * self.space.model.parameters / 8 + 0.5, float(self.space.sizes.min(1).sum()))
        return self.space.config(near_optimal(price, self.space.sizes.astype(np.float64), budget))
