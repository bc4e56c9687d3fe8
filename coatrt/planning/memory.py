"""Memory of a plan, line by line: what a device holds to serve one configuration."""

from collections.abc import Mapping

from coatrt.configs.config import QuantConfig
from coatrt.devices.profiles import DeviceProfile
from coatrt.models.matrices import ModelMatrices
from coatrt.planning.engine_size import engine_overhead
from coatrt.planning.workload import Workload

__all__ = ["CPU_RESERVE", "RUNTIME_RESERVE", "fixed_memory", "memory_of", "scale_bytes"]

RUNTIME_RESERVE = 512 << 20
"""Bytes left to the CUDA context, the runtime and the display: an assumption, not a measurement."""

CPU_RESERVE = 160 << 20
"""Bytes of Python, ONNX Runtime and its arena before any graph, measured (benchmarks/fleet.py)."""


def scale_bytes(config: QuantConfig, model: ModelMatrices) -> int:
    """Return the bytes of all scales; codes are the rest of `QuantConfig.nbytes`."""
    total = 0
    for matrix in model.matrices:
        fmt = config[matrix.name].effective(matrix.K)
        codes = -(-matrix.N * fmt.padded(matrix.K) * fmt.bits // 8)
        total += fmt.nbytes(matrix.N, matrix.K) - codes
    return total


def fixed_memory(model: ModelMatrices, device: DeviceProfile, workload: Workload) -> dict[str, int]:
    """Return the lines that no configuration changes, bytes by purpose."""
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

    Args:
        config: the configuration.
        model: its matrices.
        device: where it runs.
        workload: context, batch and prompt length.
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
