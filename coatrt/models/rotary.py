"""The rotary frequencies of a model, read from transformers' own rotary module."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coatrt.errors import CheckpointError, reason

__all__ = ["Rotary", "rotations"]


@dataclass(frozen=True)
class Rotary:
    """One set of rotary frequencies.

    Args:
        frequencies: in radians per position, one for two rotated dimensions.
        scaling: factor on the cosines and sines.
        long_frequencies: of a sequence longer than `short_positions` (longrope); empty if they do not change.
        short_positions: see `long_frequencies`; 0 if they do not change.
    """

    frequencies: tuple[float, ...]
    scaling: float = 1.0
    long_frequencies: tuple[float, ...] = ()
    short_positions: int = 0


def rotations(config: Any) -> Mapping[str, Rotary]:
    """Return the frequencies of each kind of layer; of all layers under "" where kinds do not differ.

    Args:
        config: a configuration of transformers.

    Raises:
        CheckpointError: a value of the rotary parameters is missing or invalid.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    module = vars(sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__module__])
    kind = next(value for name, value in module.items() if name.endswith("RotaryEmbedding"))
    try:
        rotary = kind(config)
        names = [""] if hasattr(rotary, "inv_freq") else [f"{name}_" for name in rotary.layer_types]
        return {name.removesuffix("_"): _read(rotary, name, config) for name in names}
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"rope_parameters or rope_scaling in config.json has a missing or invalid value ({reason(error)}); "
            "download it again"
        ) from None


def _read(rotary: Any, prefix: str, config: Any) -> Rotary:
    """Return the frequencies of a rotary module whose attributes begin with `prefix`."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    layer_type = prefix.removesuffix("_") or None
    frequencies = tuple(getattr(rotary, f"{prefix}inv_freq").tolist())
    scaling = float(getattr(rotary, f"{prefix}attention_scaling"))
    parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    kind = rotary.rope_type if layer_type is None else rotary.rope_type[layer_type]
    if kind == "dynamic":
        raise CheckpointError(
            "rope type 'dynamic' cannot be exported: graphs have fixed rotary tables; use another model"
        )
    if kind != "longrope":
        return Rotary(frequencies, scaling)
    short = int(parameters["original_max_position_embeddings"])
    long, _ = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=short + 1, layer_type=layer_type)
    return Rotary(frequencies, scaling, tuple(long.tolist()), short)
