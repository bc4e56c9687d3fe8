"""The specification of a decoder, read from a Hugging Face configuration; the graph writer follows it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from coatrt.errors import CheckpointError, ConfigError, reason
from coatrt.models.config_file import model_type
from coatrt.models.families import FAMILIES, LEFT_OUT, Family
from coatrt.models.rotary import Rotary, rotations
from coatrt.models.transformers_config import complete_config

__all__ = ["DecoderSpec"]

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
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu2": "relu2",
    "xielu": "xielu",
}


@dataclass(frozen=True)
class DecoderSpec:
    """Shapes and operations of a decoder-only model; `FAMILIES[family]` has the names of its modules.

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
        layer_norm: whether norms also subtract the mean and add a bias.
        norm_offset: added to every norm weight.
        parallel: whether attention and MLP read the same input.
        activation: activation of the gate, or of the MLP without one.
        gated: whether the MLP multiplies by a gate.
        interleaved: whether the rotation pairs neighbouring dimensions.
        rotations: sets of rotary frequencies.
        rotary: per layer, its set in `rotations`; None for a layer without rotary positions.
        windows: per layer, positions that a query attends to, itself included; None for all.
        embedding_multiplier: factor on the embeddings.
        residual_multiplier: factor on the output of attention and MLP before it is added.
        attention_multiplier: factor on query · key.
        attention_cap: soft cap c of query · key, which becomes c · tanh(x / c); 0 for none.
        logits_divisor: divisor of the logits.
        logits_cap: soft cap of the divided logits; 0 for none.
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
    parallel: bool
    activation: Literal["silu", "gelu", "gelu_tanh", "relu2", "xielu"]
    gated: bool
    interleaved: bool
    rotations: tuple[Rotary, ...]
    rotary: tuple[int | None, ...]
    windows: tuple[int | None, ...]
    embedding_multiplier: float
    residual_multiplier: float
    attention_multiplier: float
    attention_cap: float
    logits_divisor: float
    logits_cap: float

    def __post_init__(self) -> None:
        for name, most in _MAXIMA.items():
            if not 1 <= getattr(self, name) <= most:
                raise CheckpointError(
                    f"{name} must be 1 to {most}, got {getattr(self, name)}; download the model again"
                )
        factors = (self.embedding_multiplier, self.residual_multiplier, self.attention_multiplier, self.norm_offset)
        numbers = [*factors, self.epsilon, self.logits_divisor, self.attention_cap, self.logits_cap]
        for rotary in self.rotations:
            numbers += [*rotary.frequencies, *rotary.long_frequencies, rotary.scaling]
        if self.logits_divisor == 0 or not all(abs(number) <= _MAX_FACTOR for number in numbers):
            raise CheckpointError(
                f"factors must be finite and at most {_MAX_FACTOR:g}, and the divisor not 0; download the model again"
            )
        if self.attention_cap < 0 or self.logits_cap < 0:
            raise CheckpointError("soft caps must be above 0, or 0 for none; download the model again")
        widths = [len(rotary.frequencies) for rotary in self.rotations]
        if not len(self.windows) == len(self.rotary) == self.layers or any(2 * n > self.head_dim + 1 for n in widths):
            raise CheckpointError(
                "windows and rotary need one entry per layer, frequencies at most one for two dimensions of a head; "
                "download the model again"
            )
        if not all(index is None or 0 <= index < len(self.rotations) for index in self.rotary):
            raise CheckpointError("a layer names rotary frequencies that are missing; download the model again")
        if not all(window is None or 1 <= window < 2**31 for window in self.windows):
            raise CheckpointError("a window must be 1 to 2147483647 positions; download the model again")

    @property
    def further_norms(self) -> int:
        """Norms of a layer beyond the two that Llama has; each is one more kernel."""
        return max(sum(bool(name) for name in FAMILIES[self.family].norms) - 2, 0)

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
            raise CheckpointError(_refusal(family, values))
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
    def _of(cls, name: str, config: Any) -> "DecoderSpec":
        # A key is read only where the table says that the family's modules in transformers read it.
        family = FAMILIES[name]
        if (activation := getattr(config, family.activation)) not in _ACTIVATIONS:
            raise CheckpointError(
                f"activation {activation!r} cannot be exported; allowed: {', '.join(_ACTIVATIONS)}; use another model"
            )
        for key, meaning in {"use_bidirectional_attention": "bidirectional attention", **family.refused}.items():
            if getattr(config, key, False):
                raise CheckpointError(f"{meaning} cannot be exported; use a checkpoint without {key}")
        for key in _COUNTS:
            if type(value := getattr(config, key)) is not int or value < 1:
                raise CheckpointError(f"{key} must be a whole number above 0, got {value}; correct config.json")
        if config.num_attention_heads % config.num_key_value_heads:
            raise CheckpointError(
                f"{config.num_attention_heads} attention heads cannot share {config.num_key_value_heads} key-value "
                "heads evenly; correct config.json"
            )
        heads, layers = int(config.num_attention_heads), int(config.num_hidden_layers)
        own_width = family.head_dim and getattr(config, "head_dim", None)
        head_dim = int(own_width or config.hidden_size // heads)
        windows = _windows(family, config, layers)
        sets = rotations(config)
        return cls(
            family=name,
            layers=layers,
            hidden=int(config.hidden_size),
            heads=heads,
            kv_heads=int(config.num_key_value_heads),
            head_dim=head_dim,
            vocabulary=int(config.vocab_size),
            max_positions=int(config.max_position_embeddings),
            epsilon=float(getattr(config, family.epsilon)),
            layer_norm=family.layer_norm,
            norm_offset=family.norm_offset,
            parallel=bool(getattr(config, family.parallel)) if isinstance(family.parallel, str) else family.parallel,
            activation=_ACTIVATIONS[activation],  # type: ignore[arg-type]
            gated=family.gated,
            interleaved=family.interleaved,
            rotations=tuple(sets.values()),
            rotary=_rotary(family, config, windows, list(sets)),
            windows=windows,
            embedding_multiplier=_power(config, family.embedding, 1.0),
            residual_multiplier=_power(config, family.residual, 1.0),
            attention_multiplier=_power(config, family.attention, head_dim**-0.5),
            attention_cap=_power(config, (family.attention_cap, 1.0), 0.0),
            logits_divisor=_power(config, family.logits, 1.0),
            logits_cap=_power(config, (family.logits_cap, 1.0), 0.0),
        )


def _refusal(family: str, values: Mapping[str, Any]) -> str:
    """Return the message about a family that is not in the table."""
    why = LEFT_OUT.get(family, "")
    if not why and any(isinstance(values.get(key), int) and values[key] > 1 for key in _EXPERT_KEYS):
        why = "a mixture of experts"
    return (
        f"model_type {family or 'missing'} cannot be exported{f' ({why})' if why else ''}; "
        f"allowed: {', '.join(FAMILIES)}; convert the checkpoint to one of them, or add the family (CONTRIBUTING.md)"
    )


def _power(config: Any, factor: tuple[str, float], default: float) -> float:
    """Return a value of the configuration raised to a power; the default if the key is "" or the value is None."""
    key, exponent = factor
    value = getattr(config, key) if key else None
    return default if value is None else float(value**exponent)


def _rotary(family: Family, config: Any, windows: tuple[int | None, ...], names: list[str]) -> tuple[int | None, ...]:
    """Return the set of rotary frequencies of each layer."""
    sets = [0] * len(windows) if names == [""] else [names.index(kind) for kind in config.layer_types[: len(windows)]]
    uses = [True] * len(windows)
    if family.rotary == "no_rope_layers":
        uses = [bool(layer) for layer in config.no_rope_layers[: len(windows)]]
    elif family.rotary == "windowed" or (family.rotary == "windowed or all" and config.sliding_window is not None):
        uses = [window is not None for window in windows]
    return tuple(index if used else None for index, used in zip(sets, uses, strict=True))


def _windows(family: Family, config: Any, layers: int) -> tuple[int | None, ...]:
    """Return the attention window of each layer."""
    window = None if family.windows == "none" else config.sliding_window
    if window is None:
        return (None,) * layers
    if window < 1:
        raise ValueError(f"sliding_window {window}")
    kinds = config.layer_types[:layers] if family.windows == "layer_types" else ["sliding_attention"] * layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)
