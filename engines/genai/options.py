"""How a bundle is exported for onnxruntime-genai."""

from dataclasses import dataclass
from typing import Literal, get_args

from coatrt.errors import ConfigError

__all__ = ["GenaiOptions", "LoraDefault", "Provider"]

Provider = Literal["cpu", "cuda"]
"""Where onnxruntime-genai runs the graph: ONNX Runtime on the CPU, or its CUDA provider."""
LoraDefault = Literal["on", "off"]


@dataclass(frozen=True)
class GenaiOptions:
    """How a bundle is exported for onnxruntime-genai.

    Args:
        provider: "cpu" or "cuda"; None for that of the bundle's device.
        lora: "on" applies the bundle's LoRA to every request that activates no adapter, "off" applies none to those.
        all_logits: return the logits of every token of a call, which evaluation and n-gram speculation need; otherwise
            those of the last token, which is faster for long prompts.
        accuracy_level: of int4 and int8 matrix products on the CPU, see `coatrt.RuntimeOptions`.
        max_length: default limit on the tokens of a sequence, prompt included: its cache takes memory for as many. None
            for the bundle's context.

    Raises:
        ConfigError: a value is not allowed.
    """

    provider: Provider | None = None
    lora: LoraDefault = "on"
    all_logits: bool = False
    accuracy_level: Literal[0, 1, 4] = 4
    max_length: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("provider", (None, *get_args(Provider))),
            ("lora", get_args(LoraDefault)),
            ("accuracy_level", (0, 1, 4)),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or value not in allowed:
                named = ", ".join(str(one) for one in allowed if one is not None)
                raise ConfigError(f"{name} must be one of {named}, got {value!r}")
        if self.max_length is not None and (type(self.max_length) is not int or self.max_length < 1):
            raise ConfigError(f"max_length must be a whole number of at least 1, got {self.max_length!r}")
