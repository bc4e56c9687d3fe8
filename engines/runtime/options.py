"""How a bundle runs: one set of options, from the command line down to the ONNX Runtime session."""

from dataclasses import dataclass
from typing import Literal, get_args

from coatrt.errors import ConfigError

__all__ = ["AccuracyLevel", "Backend", "RuntimeOptions"]

Backend = Literal["ort", "trt", "cuda"]
"""ONNX Runtime on the CPU, the bundle's TensorRT engine on this machine's GPU, or ONNX Runtime on the GPU."""

AccuracyLevel = Literal[0, 1, 4]

_LIMITS = {"threads": 512, "context": 2**31 - 1, "batch": 65536}
# Starting thousands of threads hangs; positions are 32-bit numbers.


@dataclass(frozen=True)
class RuntimeOptions:
    """How a bundle runs.

    Args:
        backend: "ort" for ONNX Runtime on the CPU, "trt" for the bundle's engine on this machine's GPU, "cuda" for ONNX
            Runtime's CUDA provider.
        threads: threads per operator (ort); None for all usable cores.
        context: KV cache slots per sequence (ort and cuda; an engine's are fixed when it is built).
        batch: sequences per step.
        accuracy_level: of int4 and int8 matrix products (ort), see `coatrt.engines.runtime.ort.session`. 0 decodes the
            weights when the graph loads: exact. 1 keeps them packed: exact and slow. 4 keeps them packed and
            accumulates in int8: fastest, and what plans for the CPU assume.
        strict_lora: refuse a LoRA of another configuration than the weights'; otherwise warn in one line.

    Raises:
        ConfigError: the backend or level is unknown, or a number is out of range.
    """

    backend: Backend = "ort"
    threads: int | None = None
    context: int = 2048
    batch: int = 1
    accuracy_level: AccuracyLevel = 4
    strict_lora: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("backend", get_args(Backend)), ("accuracy_level", get_args(AccuracyLevel))):
            if isinstance(getattr(self, name), bool) or getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}")
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if value is None and name == "threads":
                continue
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")
            if value > limit:
                raise ConfigError(f"{name} must be at most {limit}, got {value}")
