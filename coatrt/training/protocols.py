"""What the optimisation loop trains."""

from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor, nn

from coatrt.configs.config import QuantConfig

__all__ = ["LoraModule"]


class LoraModule(Protocol):
    """What the loop trains: a module that gives each matrix its pair for a configuration."""

    def pairs(self, config: QuantConfig) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Return matrix name → (A [K, r], scaled B [r, N])."""

    def parameter_groups(self) -> Mapping[str, list[nn.Parameter]]:
        """Return the parameters that learn, by the name of their rate (`TrainOptions.rates`)."""

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Return every parameter by name."""
