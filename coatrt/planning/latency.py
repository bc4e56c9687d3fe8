"""Predicted seconds of decoding and prefill: a device's datasheet, corrected by shares that are assumptions.

Timings of the device (`coatrt.planning.measured_latency`) and constants measured on GPUs like it
(`coatrt.planning.cuda_latency`) have the same interface and replace it where they exist.
"""

from functools import cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from coatrt.configs.config import QuantConfig
from coatrt.configs.space import ConfigSpace
from coatrt.devices.profiles import DeviceProfile
from coatrt.models.matrices import ModelMatrices
from coatrt.planning.cuda_latency import CONSTANTS, CudaLatency
from coatrt.planning.measured_latency import find_timings
from coatrt.planning.memory import Workload
from coatrt.quantization.weight_format import WeightFormat

__all__ = ["DatasheetLatency", "LatencyModel", "decoded_in_steps", "group_seconds", "latency_of", "products_seconds"]

BANDWIDTH_SHARE = 0.8
"""Share of the peak bandwidth that products of one token reach: assumed; no engine has run yet."""

FLOPS_SHARE = 0.5
"""Share of the dense FP16 throughput that prefill reaches: assumed."""

KERNEL_SECONDS = CONSTANTS.kernel_seconds
"""Least seconds of a kernel at decode, in a replayed CUDA graph: measured in ONNX Runtime on H100 and H200 (SM90).

The time of a small kernel depends on GPU and driver, so it is taken over for engines. Bandwidth and throughput shares
depend on the kernels that TensorRT picks, and stay assumed.
"""

LAYER_KERNELS = 6
"""Kernels of a layer beside one for each of its seven matrices: TensorRT-RTX's engines have thirteen in all, four of
them products (benchmarks/results/engine_program.json)."""

CAP_KERNELS = 3
"""Kernels that a soft cap of the attention adds to a layer in an engine: attention is no longer one kernel; assumed."""

LORA_KERNELS = 8
"""Kernels that a LoRA adds to a layer in those engines."""


class LatencyModel(Protocol):
    """Predicts seconds on one device."""

    @property
    def source(self) -> str:
        """The source of the prediction, and its assumptions."""

    def matrix_seconds(self, N: int, K: int, fmt: WeightFormat, tokens: int) -> float:
        """Return the seconds of one product of [tokens, K] with a weight [N, K] in a format."""

    def rest_seconds(self, model: ModelMatrices, workload: Workload, tokens: int, context: int) -> float:
        """Return the seconds of all else in one call: LoRA, attention over `context` slots, norms, launches."""


def decoded_in_steps(fmt: WeightFormat, K: int) -> bool:
    """Return whether an engine decodes weights of a format to 16 bits in every step.

    These are NormalFloat, nvfp4 beside 16-bit activations, and int8 in blocks (`benchmarks/engine_program.py`).
    """
    return fmt.is_normal_float or fmt.kind == "nvfp4" or (fmt.kind == "int8" and 0 < fmt.block < K)


class DatasheetLatency:
    """Bytes over effective bandwidth or FLOPs over effective throughput, whichever takes longer, plus launches.

    Where TensorRT-RTX 1.7.1 has no product for a format, a kernel of its own writes the weight in 16 bits in every step
    and the product reads it back: 4 bytes a weight beside the packed ones. Its engines say for which formats
    (`coatrt.engines.measure.engine_program`); regular TensorRT is assumed to do the same.
    """

    def __init__(self, device: DeviceProfile) -> None:
        assert device.bandwidth is not None, "planning needs a known bandwidth"
        self._bandwidth = BANDWIDTH_SHARE * device.bandwidth
        self._flops = FLOPS_SHARE * device.fp16_flops if device.fp16_flops is not None else None

    @property
    def source(self) -> str:
        """The source of the prediction."""
        return (
            f"datasheet; assumed: {BANDWIDTH_SHARE:.0%} of peak bandwidth, {FLOPS_SHARE:.0%} of FP16 throughput; "
            f"read from engines: formats decoded in every step; measured: {KERNEL_SECONDS * 1e6:.2g} µs a kernel "
            f"({CONSTANTS.runtime} on {' and '.join(CONSTANTS.gpus)})"
        )

    def matrix_seconds(self, N: int, K: int, fmt: WeightFormat, tokens: int) -> float:
        """Return the seconds of one product, its launch included."""
        unpack = 4 * N * K / self._bandwidth + KERNEL_SECONDS if decoded_in_steps(fmt, K) else 0.0
        return max(fmt.nbytes(N, K) / self._bandwidth, self._compute(2 * N * K * tokens)) + unpack + KERNEL_SECONDS

    def rest_seconds(self, model: ModelMatrices, workload: Workload, tokens: int, context: int) -> float:
        """Return the seconds of LoRA, caches, attention and launches."""
        caches = workload.kv_bytes * min(context / workload.context, 1.0)
        read = model.other_bytes + workload.lora_bytes + caches
        flops = 2 * workload.lora_parameters * tokens
        spec = workload.spec
        flops += 4 * spec.layers * spec.heads * spec.head_dim * context * tokens
        layer = LAYER_KERNELS + spec.further_norms + (CAP_KERNELS if spec.attention_cap else 0)
        kernels = spec.layers * (layer + (LORA_KERNELS if workload.lora_parameters else 0)) + 4
        return max(read / self._bandwidth, self._compute(flops)) + kernels * KERNEL_SECONDS

    def _compute(self, flops: float) -> float:
        return flops / self._flops if self._flops is not None else 0.0


def latency_of(device: DeviceProfile, space: ConfigSpace, workload: Workload) -> LatencyModel | None:
    """Return the model that predicts a device's seconds: timings, else measured constants, else datasheet, else None.

    Raises:
        ConfigError: a file of timings is garbled.
    """
    timings = find_timings(device, space, workload)
    if timings is not None:
        return timings
    if CudaLatency.serves(device):
        return CudaLatency(device)
    return DatasheetLatency(device) if device.bandwidth else None


def group_seconds(space: ConfigSpace, latency: LatencyModel, tokens: int) -> NDArray[np.float64]:
    """Return the seconds of every group in every format, [groups, formats], with `tokens` decoded at once.

    All products have as many rows, the head's too; an untied embedding is looked up, not read.
    """
    of_shape = cache(latency.matrix_seconds)  # most matrices have the shape of another
    multiplied = {matrix.name: matrix for matrix in space.model.multiplied}

    def seconds(name: str, fmt: WeightFormat) -> float:
        matrix = multiplied.get(name)
        return of_shape(matrix.N, matrix.K, fmt, tokens) if matrix is not None else 0.0

    return np.array([[sum(seconds(name, fmt) for name in group) for fmt in space.formats] for group in space.groups])


def products_seconds(
    latency: LatencyModel, model: ModelMatrices, config: QuantConfig, tokens: int, head_tokens: int
) -> float:
    """Return the seconds of all products of one call with `tokens` rows, the head's with `head_tokens`.

    Of a prompt only the last token gets logits.
    """
    return sum(
        latency.matrix_seconds(matrix.N, matrix.K, config[matrix.name], head_tokens if matrix.is_table else tokens)
        for matrix in model.multiplied
    )
