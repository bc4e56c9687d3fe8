"""The memory of a plan, line by line, and the workload of a decoder beside its weights."""

from collections.abc import Mapping
from dataclasses import dataclass

from coatrt.adapter.description import AdapterDescription
from coatrt.configs.config import QuantConfig
from coatrt.devices.profiles import DeviceProfile
from coatrt.models.matrices import ModelMatrices
from coatrt.models.spec import DecoderSpec
from coatrt.planning.engine_size import engine_overhead

__all__ = ["CPU_RESERVE", "RUNTIME_RESERVE", "Workload", "fixed_memory", "memory_of", "scale_bytes"]

RUNTIME_RESERVE = 512 << 20
"""Bytes left to the CUDA context, the runtime and the display: an assumption, not a measurement."""

CPU_RESERVE = 160 << 20
"""Bytes of Python, ONNX Runtime and its arena before any graph, measured (benchmarks/fleet.py)."""


@dataclass(frozen=True)
class Workload:
    """Everything that an engine holds beside its weights.

    Args:
        spec: the model's architecture.
        intermediate: width of the MLP.
        lora_parameters: elements of the LoRA inputs of a graph.
        context: slots of the KV cache per sequence.
        batch: sequences decoded together.
        prefill: most prompt tokens in one call.
        element: bytes of an activation, a cache element and a LoRA element: 2 in engines, 4 on the CPU.
    """

    spec: DecoderSpec
    intermediate: int
    lora_parameters: int
    context: int
    batch: int
    prefill: int
    element: int

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache."""
        spec = self.spec
        return 2 * self.element * spec.layers * spec.kv_heads * spec.head_dim * self.context * self.batch

    @property
    def lora_bytes(self) -> int:
        """Bytes of the LoRA tensors."""
        return self.element * self.lora_parameters

    @property
    def activation_bytes(self) -> int:
        """Bytes of activations at prefill: residual and its copies, MLP, one row of logits per sequence."""
        row = 6 * self.spec.hidden + 3 * self.intermediate
        return self.element * self.batch * (self.prefill * row + self.spec.vocabulary)

    @classmethod
    def of(cls, adapter: AdapterDescription, context: int, batch: int, prefill: int, element: int = 2) -> "Workload":
        """Return the workload of an adapter and its model; the numbers are those of the class.

        Raises:
            ConfigError: the context exceeds the model's positions.
        """
        adapter.spec.check_context(context)
        intermediate = max(matrix.K for matrix in adapter.model.targets)
        return cls(adapter.spec, intermediate, adapter.lora_parameters, context, batch, prefill, element)


def scale_bytes(config: QuantConfig, model: ModelMatrices) -> int:
    """Return the bytes of all scales; codes are the rest of `QuantConfig.nbytes`."""
    total = 0
    for matrix in model.matrices:
        fmt = config[matrix.name].effective(matrix.K)
        codes = -(-matrix.N * fmt.padded(matrix.K) * fmt.bits // 8)
        total += fmt.nbytes(matrix.N, matrix.K) - codes
    return total


def fixed_memory(model: ModelMatrices, device: DeviceProfile, workload: Workload) -> dict[str, int]:
    """Return the lines that are the same for every configuration, bytes by purpose."""
    return {
        "other tensors": model.other_bytes * workload.element // 2,
        "LoRA": workload.lora_bytes,
        "KV cache": workload.kv_bytes,
        "activations": workload.activation_bytes,
        "runtime": RUNTIME_RESERVE if device.sm else CPU_RESERVE,
    }


def memory_of(
    config: QuantConfig, model: ModelMatrices, device: DeviceProfile, workload: Workload
) -> Mapping[str, int]:
    """Return every line: codes, scales, other tensors, engine overhead, LoRA, KV cache, activations, runtime.

    The engine's own bytes are the sum of the first four.
    """
    scales = scale_bytes(config, model)
    fixed = fixed_memory(model, device, workload)
    return {
        "weights": config.nbytes(model) - scales,
        "scales": scales,
        "other tensors": fixed.pop("other tensors"),
        "engine": engine_overhead(config, model, device.sm),
        **fixed,
    }
