"""What a decoder computes, read from a Hugging Face configuration: one frozen value that the graph writer follows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from coatrt.errors import CheckpointError, ConfigError
from coatrt.models.config_file import model_type

__all__ = ["FAMILIES", "DecoderSpec"]

FAMILIES = ("gemma", "granite", "llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3", "stablelm")
"""Values of model_type that the graph writer knows, each tested against transformers."""

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


@dataclass(frozen=True)
class DecoderSpec:
    """Geometry and arithmetic of a decoder-only model of the Llama kind.

    Args:
        family: model_type of the checkpoint.
        layers: number of decoder layers.
        hidden: width of the residual stream.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of one head.
        vocabulary: rows of the embedding table.
        max_positions: longest sequence the model was made for.
        epsilon: of every normalization.
        layer_norm: normalizations also subtract the mean and add a bias (stablelm).
        norm_offset: added to every norm weight (gemma stores weight − 1).
        norm_after: norms stand behind attention and MLP instead of before them (olmo2).
        activation: of the gate.
        inverse_frequencies: rotary frequencies in radians per position; half as many as rotated dimensions.
        rope_scaling: factor on the rotary cosines and sines.
        windows: per layer, positions a query sees (itself included); None for all.
        rotary: per layer, whether positions are rotated in.
        embedding_multiplier: factor on the embeddings.
        residual_multiplier: factor on what a layer adds.
        attention_multiplier: factor on query · key.
        logits_divisor: the logits are divided by it.
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

    def check_context(self, context: int) -> None:
        """Refuse more slots of the KV cache than the model has positions.

        Raises:
            ConfigError: there are more.
        """
        if context > self.max_positions:
            raise ConfigError(
                f"a context of {context} is given and the model has {self.max_positions} positions; "
                f"give --context {self.max_positions} or less"
            )

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> "DecoderSpec":
        """Return the specification in the content of a config.json; transformers fills in what it leaves out.

        Raises:
            CheckpointError: the family, rope type or activation is unknown.
        """
        family = model_type(values)
        if family not in FAMILIES:
            raise CheckpointError(
                f"model_type {family or 'missing'} cannot be exported; allowed: {', '.join(FAMILIES)}; "
                "convert the checkpoint to one of them or add the family to the graph writer"
            )
        config = _complete(family, values)
        if config.hidden_act not in _ACTIVATIONS:
            raise CheckpointError(
                f"activation {config.hidden_act!r} cannot be exported; allowed: {', '.join(_ACTIVATIONS)}"
            )
        if getattr(config, "use_parallel_residual", False):
            raise CheckpointError(
                "parallel residuals cannot be exported; give a checkpoint without use_parallel_residual"
            )
        heads = int(config.num_attention_heads)
        head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        frequencies, scaling = _rope(config, head_dim)
        layers = int(config.num_hidden_layers)
        no_rope = getattr(config, "no_rope_layers", None) or [1] * layers
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
            windows=_windows(config, layers),
            rotary=tuple(bool(uses) for uses in no_rope[:layers]),
            embedding_multiplier=float(
                config.hidden_size**0.5 if family == "gemma" else getattr(config, "embedding_multiplier", 1.0)
            ),
            residual_multiplier=float(getattr(config, "residual_multiplier", 1.0)),
            attention_multiplier=float(getattr(config, "attention_multiplier", head_dim**-0.5)),
            logits_divisor=float(getattr(config, "logits_scaling", 1.0)),
        )


def _complete(family: str, values: Mapping[str, Any]) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_TYPES:  # before transformers asks for its other fields
        raise CheckpointError(
            f"rope type {kind!r} cannot be exported: a graph has fixed rotary tables; allowed: {', '.join(_ROPE_TYPES)}"
        )
    try:
        return CONFIG_MAPPING[family].from_dict(dict(values))
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(
            f"config.json is no valid {family} configuration ({str(error).splitlines()[0]}); fetch the model again"
        ) from None


def _rope(config: Any, head_dim: int) -> tuple[tuple[float, ...], float]:
    """Return inverse frequencies and the factor on cosines and sines, as transformers computes them."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":
        # The other families' models rotate whole heads, whatever their configuration says.
        width = int(head_dim * rope["partial_rotary_factor"]) if config.model_type == "stablelm" else head_dim
        exponents = torch.arange(0, width, 2, dtype=torch.float) / width
        return tuple((1.0 / rope["rope_theta"] ** exponents).tolist()), 1.0
    try:
        frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"rope type {kind} lacks or garbles {error} in config.json; fetch it again") from None
    return tuple(frequencies.tolist()), float(scaling)


def _windows(config: Any, layers: int) -> tuple[int | None, ...]:
    """Return the attention window of each layer."""
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return (None,) * layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds[:layers])
