"""Configurations: matrix → weight format for a whole model; a resolved one names every matrix and is hashable."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from coatrt.errors import ConfigError, FormatError
from coatrt.models.matrices import ModelMatrices
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.json_data import read_as, write_json

__all__ = ["ConfigPatterns", "QuantConfig", "matching_names"]


def matching_names(pattern: str, model: ModelMatrices, remedy: str = "correct or remove it") -> tuple[str, ...]:
    """Return the names of matrices that a glob matches as a whole: `*`, `?`, `[abc]`, `[a-z]`, `[!x]`.

    Raises:
        ConfigError: it matches none; the message ends with `remedy`.
    """
    names = tuple(name for name in model.names if fnmatchcase(name, pattern))
    if not names:
        if re.search(r"\.\*|\\\.|[(|+^$]", pattern):
            remedy = "patterns are globs, not regular expressions: write *.mlp.* or *[qkv]_proj"
        raise ConfigError(
            f"the pattern {pattern!r} matches none of the model's {len(model.names)} matrices "
            f"(like {model.names[-1]}); {remedy}"
        )
    return names


@dataclass(frozen=True)
class QuantConfig:
    """A resolved configuration: every matrix of one model with its exact format.

    Args:
        formats: matrix name → weight format, in any order; stored sorted by name.
    """

    formats: Mapping[str, WeightFormat]

    def __post_init__(self) -> None:
        object.__setattr__(self, "formats", MappingProxyType(dict(sorted(self.formats.items()))))

    def __hash__(self) -> int:
        return hash(self.hash)

    def __getitem__(self, name: str) -> WeightFormat:
        return self.formats[name]

    @classmethod
    def uniform(cls, model: ModelMatrices, weight_format: WeightFormat | str) -> "QuantConfig":
        """Return the configuration with one format on all matrices of `model`."""
        return cls(dict.fromkeys(model.names, WeightFormat.parse(weight_format)))

    @cached_property
    def hash(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """Number of matrices by format text, most frequent first."""
        return dict(Counter(str(weight_format) for weight_format in self.formats.values()).most_common())

    def nbytes(self, model: ModelMatrices) -> int:
        """Return the exact bytes of all matrices of `model`, including scales, without other tensors."""
        return sum(self.formats[matrix.name].nbytes(matrix.N, matrix.K) for matrix in model.matrices)

    def average_bits(self, model: ModelMatrices) -> float:
        """Return the average bits per weight over all matrices of `model`, including scales."""
        return 8 * self.nbytes(model) / model.parameters

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form: {"matrices": {name: format}}."""
        return {"matrices": {name: str(weight_format) for name, weight_format in self.formats.items()}}

    def save(self, path: str | Path) -> None:
        """Write the JSON form to `path`, atomically."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path, model: ModelMatrices) -> "QuantConfig":
        """Read a configuration for `model` from a JSON file, resolved or with patterns.

        Raises:
            ConfigError: the file is missing, not a configuration, or names a matrix the model lacks.
            FormatError: it names an unknown format.
        """
        value = read_as(path, object, "configuration", "give a JSON file")
        return ConfigPatterns.from_json(value, str(path)).resolve(model)


@dataclass(frozen=True)
class ConfigPatterns:
    """A configuration with patterns: an exact name wins over the first matching pattern, which wins over the default.

    Args:
        matrices: matrix name → format; each name must be a matrix of the model.
        patterns: (glob, format), tried in order against the whole name.
        default: format of every other matrix; None: a matrix without a format is an error.
    """

    matrices: Mapping[str, WeightFormat] = field(default_factory=dict)
    patterns: tuple[tuple[str, WeightFormat], ...] = ()
    default: WeightFormat | None = None

    @classmethod
    def from_json(cls, value: Any, source: str = "configuration") -> "ConfigPatterns":
        """Read {"matrices": {name: format}, "patterns": {glob: format}, "default": format}, each key optional.

        Raises:
            ConfigError: other keys or wrong types.
            FormatError: an unknown format.
        """
        allowed = {"matrices", "patterns", "default"}
        if not isinstance(value, dict) or not value or not set(value) <= allowed:
            keys = ", ".join(sorted(value)) if isinstance(value, dict) else type(value).__name__
            raise ConfigError(
                f"{source} holds {keys or 'nothing'}; a configuration has the keys {', '.join(sorted(allowed))}"
            )
        for key in ("matrices", "patterns"):
            if not isinstance(value.get(key, {}), dict):
                raise ConfigError(f"{source}: {key} is a {type(value[key]).__name__}; give an object of name: format")

        def parse(where: str, text: Any) -> WeightFormat:
            try:
                return WeightFormat.parse(text)
            except FormatError as error:
                raise FormatError(f"{source}: {where}: {error}") from None

        return cls(
            {name: parse(name, text) for name, text in value.get("matrices", {}).items()},
            tuple((pattern, parse(pattern, text)) for pattern, text in value.get("patterns", {}).items()),
            parse("default", value["default"]) if value.get("default") is not None else None,
        )

    def resolve(self, model: ModelMatrices) -> QuantConfig:
        """Return the resolved configuration for `model`.

        Raises:
            ConfigError: an exact name is not a matrix of the model, a pattern matches none, or a matrix has no format.
        """
        for name in self.matrices:
            if name not in model.by_name:
                raise ConfigError(
                    f"the configuration names {name!r}, which the model lacks; its {len(model.names)} matrices are "
                    f"{model.names[0]}, {model.names[min(1, len(model.names) - 1)]}; correct the name or use patterns"
                )
        matched: dict[str, WeightFormat] = {}
        for pattern, weight_format in self.patterns:
            for name in matching_names(pattern, model):
                matched.setdefault(name, weight_format)  # the first pattern wins
        formats = {}
        for name in model.names:
            fmt = self.matrices.get(name) or matched.get(name, self.default)
            if fmt is None:
                raise ConfigError(f"the configuration gives {name} no format; name it, match it, or add a default")
            formats[name] = fmt
        return QuantConfig(formats)
