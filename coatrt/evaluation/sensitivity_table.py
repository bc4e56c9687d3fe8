"""Sensitivities as data: costs and errors of every matrix in every format; needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from coatrt.system.ranges import Measure, Real

__all__ = ["Sensitivity"]


@dataclass(frozen=True)
class Sensitivity:
    """Costs and errors of every matrix in every format.

    Args:
        costs: matrix → format text → predicted loss increase, nats per token.
        errors: matrix → format text → ‖W − Q(W)‖ / ‖W‖.
    """

    costs: Mapping[str, Mapping[str, Real]]
    errors: Mapping[str, Mapping[str, Measure]]
