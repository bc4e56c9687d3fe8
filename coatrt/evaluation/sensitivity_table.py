"""Sensitivities as data: costs and errors of every matrix in every format; read without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coatrt.errors import ConfigError
from coatrt.system.files import read_json, write_json

__all__ = ["Sensitivity"]


@dataclass(frozen=True)
class Sensitivity:
    """Costs and errors of every matrix in every format.

    Args:
        costs: matrix → format text → predicted loss increase, nats per token.
        errors: matrix → format text → ‖W − Q(W)‖ / ‖W‖.
    """

    costs: Mapping[str, Mapping[str, float]]
    errors: Mapping[str, Mapping[str, float]]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON form that `from_json` reads back."""
        return {"costs": self.costs, "errors": self.errors}

    @classmethod
    def from_json(cls, value: Any) -> "Sensitivity":
        """Return the sensitivities written by `to_json`.

        Raises:
            ConfigError: it is none.
        """
        try:
            costs, errors = (
                {name: {text: float(x) for text, x in row.items()} for name, row in value[key].items()}
                for key in ("costs", "errors")
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"the sensitivities are garbled ({error}); measure them again (coatrt train)") from None
        return cls(costs, errors)

    def save(self, path: str | Path) -> None:
        """Write the JSON form to `path`, atomically."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "Sensitivity":
        """Return the sensitivities in a JSON file."""
        return cls.from_json(read_json(path, "sensitivities"))
