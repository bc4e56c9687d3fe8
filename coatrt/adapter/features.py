"""The inputs of the hypernetwork for a configuration: index fields and numbers, all from constant tables."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from coatrt.configs.config import QuantConfig
from coatrt.errors import ConfigError
from coatrt.models.matrices import ModelMatrices
from coatrt.quantization.weight_format import BLOCKS, KINDS, SCALE_BITS, SCALE_BLOCKS, SCALE_DTYPES, WeightFormat

__all__ = ["FEATURES", "FIELD_SIZES", "ConfigEncoder"]

FIELD_SIZES = (len(KINDS), len(SCALE_BITS), len(SCALE_DTYPES), len(BLOCKS), len(SCALE_BLOCKS))
"""Distinct values of the five format fields: kind (b), b0, b1, B0, B1."""

FEATURES = ("bits", "error", "average bits", "layer bits")
"""Per target module: bits per weight / 8; log10 of its relative error, / 4; size-weighted average bits of all target
modules, and of those in its layer, both / 8."""

_BITS_UNIT = 8.0
_ERROR_UNIT = 4.0
_MIN_ERROR = 1e-4


@dataclass(frozen=True)
class ConfigEncoder:
    """Turns the format of every target module into inputs of the hypernetwork.

    A configuration is one integer per target module in network order, its index in `formats`; the rest is tables.

    Args:
        model: the matrices; only `model.targets` are encoded.
        formats: the adapter's formats.
        errors: matrix name → format text → ‖W − Q(W)‖ / ‖W‖.
    """

    model: ModelMatrices
    formats: tuple[WeightFormat, ...]
    errors: Mapping[str, Mapping[str, float]]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the target modules, in network order."""
        return tuple(matrix.name for matrix in self.model.targets)

    @cached_property
    def module_kinds(self) -> tuple[str, ...]:
        """Kinds of target modules (q_proj and so on), in order of first appearance."""
        return tuple(dict.fromkeys(matrix.kind for matrix in self.model.targets))

    @cached_property
    def layers(self) -> int:
        """Decoder layers."""
        return 1 + max(matrix.layer for matrix in self.model.targets)

    @cached_property
    def places(self) -> Tensor:
        """Layer and kind of every target module, int64 [M, 2]."""
        rows = [(matrix.layer, self.module_kinds.index(matrix.kind)) for matrix in self.model.targets]
        return torch.tensor(rows, dtype=torch.int64)

    @cached_property
    def fields(self) -> Tensor:
        """The five field indices of every format, int64 [F, 5]."""
        rows = [
            (
                KINDS.index(fmt.kind),
                SCALE_BITS.index(fmt.scale_bits),
                SCALE_DTYPES.index(fmt.scale_dtype),
                BLOCKS.index(fmt.block),
                SCALE_BLOCKS.index(fmt.scale_block),
            )
            for fmt in self.formats
        ]
        return torch.tensor(rows, dtype=torch.int64)

    @cached_property
    def own(self) -> Tensor:
        """Bits / 8 and log10(error) / 4 of every target module in every format, float32 [M, F, 2]."""
        rows = []
        for matrix in self.model.targets:
            for fmt in self.formats:
                error = self.errors.get(matrix.name, {}).get(str(fmt))
                if error is None:
                    raise ConfigError(f"the sensitivities have no error of {matrix.name} in {fmt}; train again")
                bits = fmt.effective(matrix.K).bits_per_weight(matrix.K)
                rows.append((bits / _BITS_UNIT, torch.tensor(max(error, _MIN_ERROR)).log10().item() / _ERROR_UNIT))
        return torch.tensor(rows).view(len(self.names), len(self.formats), 2)

    @cached_property
    def shares(self) -> Tensor:
        """Weight of every target module in the averages, float32 [1 + layers, M]: first the model, then each layer."""
        sizes = torch.tensor([float(matrix.N * matrix.K) for matrix in self.model.targets], dtype=torch.float64)
        layer = self.places[:, 0]
        rows = torch.stack([sizes] + [sizes * (layer == i) for i in range(self.layers)])
        return (rows / rows.sum(1, keepdim=True)).float()

    def format_ids(self, config: QuantConfig) -> Tensor:
        """Return the index in `formats` of every target module's format, int64 [M].

        Raises:
            ConfigError: a target module has no format, or one the adapter was not trained for.
        """
        index = {fmt: i for i, fmt in enumerate(self.formats)}
        ids = []
        for name in self.names:
            fmt = config.formats.get(name)
            if fmt is None:
                raise ConfigError(f"the configuration gives {name} no format; use a configuration of this model")
            place = index.get(fmt)
            if place is None:
                raise ConfigError(
                    f"{name} is {fmt}, which the adapter was not trained for; "
                    f"allowed: {', '.join(map(str, self.formats))}"
                )
            ids.append(place)
        return torch.tensor(ids, dtype=torch.int64)

    def indices(self, ids: Tensor) -> Tensor:
        """Return the seven index fields of every target module, int64 [M, 7]: kind, b0, b1, B0, B1, layer, module."""
        return torch.cat([self.fields[ids], self.places], 1)

    def features(self, ids: Tensor) -> Tensor:
        """Return the numbers of `FEATURES` for every target module, float32 [M, 4]."""
        own = self.own[torch.arange(len(ids)), ids]
        averages = self.shares @ own[:, 0]
        return torch.stack([own[:, 0], own[:, 1], averages[0].expand(len(ids)), averages[1:][self.places[:, 0]]], 1)
