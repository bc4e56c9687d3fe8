"""The specification of a decoder, read from a Hugging Face configuration; the graph writer follows it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from coatrt.errors import CheckpointError, ConfigError, reason
from coatrt.models.config_file import model_type
from coatrt.models.transformers_config import complete_config

__all__ = ["FAMILIES", "DecoderSpec"]

FAMILIES = ("gemma", "granite", "llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3", "stablelm")
"""Values of model_type that the graph writer knows, each tested against transformers."""

_COUNTS = (
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "hidden_size",
    "vocab_size",
    "intermediate_size",
    "max_position_embeddings",
)
_MAXIMA = {
    "layers": 4096,
    "hidden": 2**20,
    "heads": 2**16,
    "kv_heads": 2**16,
    "head_dim": 2**16,
    "vocabulary": 2**31 - 1,
}
_MAXIMA |= {"max_positions": 2**31 - 1}
_CONFIG_MAXIMA = {
    "num_hidden_layers": _MAXIMA["layers"],
    "head_dim": _MAXIMA["head_dim"],
}  # for other keys the limit of _COUNTS
_MAX_FACTOR = 1e18
_WINDOW_PER_LAYER = ("qwen2", "qwen3", "smollm3")  # families whose modules honour layer_types
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


@dataclass(frozen=True)
class DecoderSpec:
    """Shapes and operations of a decoder-only, Llama-like model.

    Args:
        family: model_type of the checkpoint.
        layers: number of decoder layers.
        hidden: width of the residual stream.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of one head.
        vocabulary: rows of the embedding table.
        max_positions: longest sequence that the model supports.
        epsilon: epsilon of every norm.
        layer_norm: whether norms also subtract the mean and add a bias (stablelm).
        norm_offset: added to every norm weight (gemma stores weight − 1).
        norm_after: whether norms follow attention and MLP instead of preceding them (olmo2).
        activation: activation of the gate.
        inverse_frequencies: rotary frequencies in radians per position, one for two rotated dimensions.
        rope_scaling: factor on the rotary cosines and sines.
        windows: per layer, positions that a query attends to, itself included; None for all.
        rotary: per layer, whether it has rotary positions.
        embedding_multiplier: factor on the embeddings.
        residual_multiplier: factor on the output of attention and MLP before it is added.
        attention_multiplier: factor on query · key.
        logits_divisor: divisor of the logits.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_positions: int
    epsilon: float
    layer_norm: bool
    norm_offset: float
    norm_after: bool
    activation: Literal["silu", "gelu", "gelu_tanh"]
    inverse_frequencies: tuple[float, ...]
    rope_scaling: float
    windows: tuple[int | None, ...]
    rotary: tuple[bool, ...]
    embedding_multiplier: float
    residual_multiplier: float
    attention_multiplier: float
    logits_divisor: float

    def __post_init__(self) -> None:
        for name, most in _MAXIMA.items():
            if not 1 <= getattr(self, name) <= most:
                raise CheckpointError(
                    f"{name} must be 1 to {most}, got {getattr(self, name)}; download the model again"
                )
        factors = (self.rope_scaling, self.embedding_multiplier, self.residual_multiplier, self.attention_multiplier)
        numbers = (*self.inverse_frequencies, *factors, self.norm_offset, self.epsilon, self.logits_divisor)
        if self.logits_divisor == 0 or not all(abs(number) <= _MAX_FACTOR for number in numbers):
            raise CheckpointError(
                f"factors must be finite and at most {_MAX_FACTOR:g}, and the divisor not 0; download the model again"
            )
        if not len(self.windows) == len(self.rotary) == self.layers or len(self.inverse_frequencies) > self.head_dim:
            raise CheckpointError(
                "windows and rotary need one entry per layer, inverse_frequencies at most one per dimension; "
                "download the model again"
            )
        if not all(window is None or 1 <= window < 2**31 for window in self.windows):
            raise CheckpointError("a window must be 1 to 2147483647 positions; download the model again")

    def check_context(self, context: int) -> None:
        """Refuse a context longer than the positions of the model.

        Raises:
            ConfigError: it is longer.
        """
        if context > self.max_positions:
            raise ConfigError(
                f"context must be at most {self.max_positions}, the positions of the model, got {context}; "
                f"give --context {self.max_positions} or less"
            )

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> "DecoderSpec":
        """Return the specification of a config.json's content; transformers fills in missing keys.

        Raises:
            CheckpointError: the family, rope type or activation is unknown, or a number is out of range.
        """
        family = model_type(values)
        if family not in FAMILIES:
            raise CheckpointError(
                f"model_type {family or 'missing'} cannot be exported; allowed: {', '.join(FAMILIES)}; "
                "convert the checkpoint to one of them, or add the family (CONTRIBUTING.md)"
            )
        if family == "mistral" and "layer_types" in values:  # transformers reads it as another family
            raise CheckpointError(
                "a mistral model with layer_types is a Ministral, which cannot be exported; use another model"
            )
        for key in (*_COUNTS, "head_dim"):  # before transformers allocates lists of that length
            most, value = _CONFIG_MAXIMA.get(key, 2**31 - 1), values.get(key)
            if isinstance(value, int) and (value > most or (key == "head_dim" and value < 0)):
                raise CheckpointError(f"config.json: {key} must be 1 to {most}, got {value}; download it again")
        config = complete_config(values)
        try:
            return cls._of(family, config)
        except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError, OverflowError) as error:
            raise CheckpointError(
                f"config.json of this {family} model has a value of the wrong type ({reason(error)}); download it again"
            ) from None

    @classmethod
    def _of(cls, family: str, config: Any) -> "DecoderSpec":
        # Each key is read only for families whose modules in transformers read it.
        if config.hidden_act not in _ACTIVATIONS:
            raise CheckpointError(
                f"activation {config.hidden_act!r} cannot be exported; allowed: {', '.join(_ACTIVATIONS)}"
            )
        if family == "stablelm" and config.use_parallel_residual:
            raise CheckpointError(
                "parallel residuals cannot be exported; use a checkpoint without use_parallel_residual"
            )
        if getattr(config, "use_bidirectional_attention", False):
            raise CheckpointError("bidirectional attention cannot be exported; use a causal language model")
        for key in _COUNTS:
            if type(value := getattr(config, key)) is not int or value < 1:
                raise CheckpointError(f"{key} must be a whole number above 0, got {value}; correct config.json")
        if config.num_attention_heads % config.num_key_value_heads:
            raise CheckpointError(
                f"{config.num_attention_heads} attention heads cannot share {config.num_key_value_heads} key-value "
                "heads evenly; correct config.json"
            )
        heads, layers, granite = int(config.num_attention_heads), int(config.num_hidden_layers), family == "granite"
        own_width = family != "stablelm" and getattr(config, "head_dim", None)
        head_dim = int(own_width or config.hidden_size // heads)
        frequencies, scaling = _rope(config, head_dim)
        return cls(
            family=family,
            layers=layers,
            hidden=int(config.hidden_size),
            heads=heads,
            kv_heads=int(config.num_key_value_heads),
            head_dim=head_dim,
            vocabulary=int(config.vocab_size),
            max_positions=int(config.max_position_embeddings),
            epsilon=float(config.layer_norm_eps if family == "stablelm" else config.rms_norm_eps),
            layer_norm=family == "stablelm",
            norm_offset=1.0 if family == "gemma" else 0.0,
            norm_after=family == "olmo2",
            activation=_ACTIVATIONS[config.hidden_act],  # type: ignore[arg-type]
            inverse_frequencies=frequencies,
            rope_scaling=scaling,
            windows=_windows(family, config, layers),
            rotary=tuple(bool(uses) for uses in config.no_rope_layers[:layers])
            if family == "smollm3"
            else (True,) * layers,
            embedding_multiplier=float(
                config.hidden_size**0.5 if family == "gemma" else config.embedding_multiplier if granite else 1.0
            ),
            residual_multiplier=float(config.residual_multiplier) if granite else 1.0,
            attention_multiplier=float(config.attention_multiplier) if granite else head_dim**-0.5,
            logits_divisor=float(config.logits_scaling) if granite else 1.0,
        )


def _rope(config: Any, head_dim: int) -> tuple[tuple[float, ...], float]:
    """Return inverse frequencies and the factor on cosines and sines, as transformers computes them."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":
        # Modules of other families ignore partial_rotary_factor and rotate whole heads.
        width = int(head_dim * rope["partial_rotary_factor"]) if config.model_type == "stablelm" else head_dim
        exponents = torch.arange(0, width, 2, dtype=torch.float) / width
        return tuple((1.0 / rope["rope_theta"] ** exponents).tolist()), 1.0
    try:
        frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"rope type {kind} in config.json has a missing or invalid value ({error}); download it again"
        ) from None
    return tuple(frequencies.tolist()), float(scaling)


def _windows(family: str, config: Any, layers: int) -> tuple[int | None, ...]:
    """Return the attention window of each layer."""
    window = getattr(config, "sliding_window", None)
    if window is None or family not in ("mistral", *_WINDOW_PER_LAYER):
        return (None,) * layers
    if window < 1:
        raise ValueError(f"sliding_window {window}")
    kinds = config.layer_types[:layers] if family in _WINDOW_PER_LAYER else ["sliding_attention"] * layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)
