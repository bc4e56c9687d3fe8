"""Configuration spaces: the matrices of a model × the allowed formats, and random configurations from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from coatrt.configs.config import QuantConfig
from coatrt.errors import ConfigError
from coatrt.models.matrices import ModelMatrices
from coatrt.quantization.weight_format import WeightFormat

__all__ = ["ConfigSpace"]

_TOLERANCE = 0.02  # bits per weight between a random configuration and its budget


@dataclass(frozen=True)
class ConfigSpace:
    """Every configuration that gives each fused group of `model` one of `formats`.

    Args:
        model: the matrices.
        formats: allowed formats, at least one.
        fused: whether the matrices of a fused group (q/k/v, gate/up) share a format, so that one kernel reads them.
    """

    model: ModelMatrices
    formats: tuple[WeightFormat, ...]
    fused: bool = True

    def __post_init__(self) -> None:
        if not self.formats or len(set(self.formats)) != len(self.formats):
            raise ConfigError(
                f"formats must be at least one, each once, got {', '.join(map(str, self.formats)) or 'none'}"
            )

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Matrix names that share a format: fused groups, or every matrix alone."""
        return self.model.groups if self.fused else tuple((name,) for name in self.model.names)

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Bytes of every group in every format, [groups, formats]."""
        by_name = self.model.by_name
        return np.array(
            [
                [sum(fmt.nbytes(by_name[name].N, by_name[name].K) for name in group) for fmt in self.formats]
                for group in self.groups
            ]
        )

    @property
    def min_bits(self) -> float:
        """Lowest average bits per weight of a configuration of the space."""
        return 8 * int(self.sizes.min(1).sum()) / self.model.parameters

    @property
    def max_bits(self) -> float:
        """Highest average bits per weight of a configuration of the space."""
        return 8 * int(self.sizes.max(1).sum()) / self.model.parameters

    def uniform(self, weight_format: WeightFormat | str) -> QuantConfig:
        """Return the configuration with one format everywhere."""
        return QuantConfig.uniform(self.model, weight_format)

    def config(self, choice: Sequence[int] | NDArray[np.int64]) -> QuantConfig:
        """Return the configuration that gives group i the format number `choice[i]`."""
        return QuantConfig(
            {name: self.formats[int(index)] for group, index in zip(self.groups, choice, strict=True) for name in group}
        )

    def contains(self, config: QuantConfig) -> bool:
        """Return whether every format of `config` is one of the space's."""
        return set(config.formats.values()) <= set(self.formats)

    def restrict(self, formats: Sequence[WeightFormat]) -> "ConfigSpace":
        """Return the space with only those of its formats that are in `formats`."""
        return ConfigSpace(self.model, tuple(fmt for fmt in self.formats if fmt in set(formats)), self.fused)

    def sample(self, rng: np.random.Generator, bits: float) -> QuantConfig:
        """Return a random configuration whose average bits are within 0.02 of `bits`, or as near as the space allows.

        Independent draws concentrate at the mean budget (LLM-QFA, ACL 2025). Here the format probabilities are a random
        preference times exp(-λ · bytes), λ set so that the expected size is the budget; then single groups change
        format at random, each change nearer to the budget, until the size is within the tolerance.
        """
        target = min(max(bits, self.min_bits), self.max_bits) * self.model.parameters / 8
        slack = _TOLERANCE * self.model.parameters / 8
        per_byte = self.sizes / self.sizes.max(1, keepdims=True)
        preference = rng.normal(size=len(self.formats)) + 0.5 * rng.normal(size=self.sizes.shape)

        def probabilities(tilt: float) -> NDArray[np.float64]:
            logits = preference - tilt * per_byte
            weights = np.exp(logits - logits.max(1, keepdims=True))
            result: NDArray[np.float64] = weights / weights.sum(1, keepdims=True)
            return result

        low, high = -1e3, 1e3
        for _ in range(60):
            middle = (low + high) / 2
            if float((probabilities(middle) * self.sizes).sum()) > target:
                low = middle
            else:
                high = middle
        cumulative = probabilities((low + high) / 2).cumsum(1)
        choice = np.minimum((rng.random((len(self.groups), 1)) > cumulative).sum(1), len(self.formats) - 1)
        rows = np.arange(len(self.groups))
        for _ in range(20 * len(self.groups)):
            gap = target - float(self.sizes[rows, choice].sum())
            if abs(gap) <= slack:
                break
            after = np.abs(gap - (self.sizes - self.sizes[rows, choice][:, None]))
            nearer = np.argwhere(after < abs(gap) - 0.5)
            if not len(nearer):
                break
            row, column = nearer[rng.integers(len(nearer))]
            choice[row] = column
        return self.config(choice)
