"""Predicted seconds of ONNX Runtime's CUDA provider: constants measured on GPUs of one compute capability.

`benchmarks/latency_constants.py` fits them to benchmarks/results/gpu and writes cuda_latency.json;
docs/evidence/planning.md has the errors on configurations outside the fit.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from coatrt.devices.profiles import DeviceProfile
from coatrt.models.matrices import Matrix, ModelMatrices
from coatrt.planning.engine_size import CPU_PACKED
from coatrt.planning.memory import Workload
from coatrt.quantization.weight_format import WeightFormat

__all__ = [
    "CONSTANTS",
    "LAYER_KERNELS",
    "LAYER_NODES",
    "LORA_NODES",
    "OTHER_KERNELS",
    "CudaConstants",
    "CudaLatency",
    "PackedProduct",
]

LAYER_NODES = 5
"""Nodes of a layer beside the products: attention, two norms, activation, gate · up; one more splits gate from up if
matrices are joined."""

LAYER_KERNELS = 9
"""Kernels of those nodes, attention five: a profile of the 135M step has 484 kernels, 211 of them products."""

OTHER_KERNELS = 3
"""Kernels of a step outside the layers and products, from the same profile."""

LORA_NODES = 3
"""Nodes of the LoRA of one product: x·A, ·B, and the addition."""


@dataclass(frozen=True)
class PackedProduct:
    """A product with packed weights and few rows: floor + inputs + weights, whose units are computed, not read.

    Args:
        floor_seconds: of any product.
        input_seconds: for each of the K inputs: a weight's column is summed in one pass.
        flops_share: 2·N·K over the time that the weights add, as a share of the FP16 throughput; unpacking limits it.
        row_share: time that each further row adds, as a share of the time of the weights.
    """

    floor_seconds: float
    input_seconds: float
    flops_share: float
    row_share: float


@dataclass(frozen=True)
class CudaConstants:
    """The fitted numbers.

    Args:
        sm: compute capability of the GPUs.
        gpus: their names.
        runtime: name and version of the runtime measured.
        bandwidth_share: bytes over time of large float16 products and of caches, of the datasheet's bandwidth.
        flops_share: FLOPs of a row over the time that it adds to a float16 product, of the datasheet's FP16 throughput;
            above 1 where a product of many rows reads its weights beside computing.
        floor_seconds: of any float16 product.
        input_seconds: of a float16 product for each of its K inputs.
        packed: kind of format → its product.
        lora_seconds: of the LoRA of one matrix, three products and more kernels: a constant,
        lora_doubling_seconds: for each doubling of K (cuBLAS splits a longer K over more blocks),
        lora_output_seconds: and for each of the N outputs.
        lora_least_input: K below which the LoRA gets no faster.
        kernel_seconds: of a kernel beside the products, in a replayed CUDA graph.
        host_seconds_per_byte: of the logits, from the GPU to an array on the host.
        launch_seconds: of a node outside a CUDA graph, by the host: a prompt is not replayed.
    """

    sm: int
    gpus: tuple[str, ...]
    runtime: str
    bandwidth_share: float
    flops_share: float
    floor_seconds: float
    input_seconds: float
    packed: Mapping[str, PackedProduct]
    lora_seconds: float
    lora_doubling_seconds: float
    lora_output_seconds: float
    lora_least_input: int
    kernel_seconds: float
    host_seconds_per_byte: float
    launch_seconds: float

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "CudaConstants":
        """Return the constants in a JSON object."""
        packed = {kind: PackedProduct(**numbers) for kind, numbers in value["packed"].items()}
        return cls(**{**value, "gpus": tuple(value["gpus"]), "packed": packed})


CONSTANTS: CudaConstants = CudaConstants.from_json(
    json.loads(resources.files("coatrt.planning").joinpath("cuda_latency.json").read_text("utf-8"))
)
"""What cuda_latency.json holds."""


class CudaLatency:
    """Seconds on a GPU that runs bundles in ONNX Runtime's CUDA provider; a `coatrt.planning.latency.LatencyModel`.

    int4 and int8 stay packed; all other formats are decoded to float16 when the graph loads, and take as long as
    float16. The LoRA's constants are of rank 16. Matrices that read one input are one product with one LoRA, as of one
    matrix of their total width.

    Args:
        device: a GPU of the compute capability that was measured, of known bandwidth and throughput.
        constants: the fitted numbers.
        joined: whether matrices that read one input are one; of the graphs that were measured, some have them apart.
    """

    def __init__(self, device: DeviceProfile, constants: CudaConstants = CONSTANTS, *, joined: bool = True) -> None:
        assert device.bandwidth is not None and device.fp16_flops is not None, "CudaLatency.serves is checked first"
        self._device, self._constants = device, constants
        self._bandwidth = constants.bandwidth_share * device.bandwidth
        self._flops = device.fp16_flops
        self._joined = joined

    @classmethod
    def serves(cls, device: DeviceProfile) -> bool:
        """Return whether the constants are valid for a device.

        They are if its compute capability was measured and its engines need regular TensorRT on the device itself:
        until an engine is built there, ONNX Runtime's CUDA provider runs the bundle.
        """
        known = device.bandwidth is not None and device.fp16_flops is not None
        return known and device.builder == "tensorrt" and device.sm == CONSTANTS.sm

    @property
    def source(self) -> str:
        """The source of the prediction: the measured figures, the GPUs, the assumptions."""
        gpus = " and ".join(self._constants.gpus)
        same = self._device.name in self._constants.gpus
        other = "" if same else f"; assumed: that {self._device.name} reaches the same shares of its datasheet"
        return (
            f"ONNX Runtime's CUDA provider (--backend cuda), measured on {gpus} with {self._constants.runtime}: "
            f"bandwidth, float16, int4 and int8 products, kernels, LoRA, host{other}; "
            "a TensorRT engine is not timed"
        )

    def matrix_seconds(self, N: int, K: int, fmt: WeightFormat, tokens: int) -> float:
        """Return the seconds of one product: packed where that is faster, else decoded first, or decoded at load."""
        dense = self._dense(N, K, tokens)
        if fmt.kind not in CPU_PACKED:
            return dense
        packed, nbytes = self._constants.packed[fmt.kind], fmt.nbytes(N, K)
        computed = 2 * N * K / (packed.flops_share * self._flops) * (1 + packed.row_share * (tokens - 1))
        read = nbytes / self._bandwidth
        direct = packed.floor_seconds + packed.input_seconds * K + max(read, computed)
        unpacked = dense + (nbytes + 2 * N * K) / self._bandwidth + self._constants.kernel_seconds
        return min(direct, unpacked)

    def _dense(self, N: int, K: int, tokens: int) -> float:
        constants = self._constants
        fixed = constants.floor_seconds + constants.input_seconds * K
        return fixed + 2 * N * K / self._bandwidth + 2 * N * K * tokens / (constants.flops_share * self._flops)

    def lora_seconds(self, N: int, K: int, tokens: int) -> float:
        """Return the seconds of one matrix's LoRA; each further row moves four times its outputs."""
        constants = self._constants
        doublings = math.log2(max(K, constants.lora_least_input))
        first = constants.lora_seconds + constants.lora_doubling_seconds * doublings + constants.lora_output_seconds * N
        return first + 8 * N * (tokens - 1) / self._bandwidth

    def rest_seconds(self, model: ModelMatrices, workload: Workload, tokens: int, context: int) -> float:
        """Return the seconds of all else.

        A prompt is launched node by node: if that takes longer than its products, the host decides.
        """
        constants, spec, targets = self._constants, workload.spec, model.targets
        on = workload.lora_parameters > 0
        seconds = (spec.layers * (LAYER_KERNELS + spec.further_norms) + OTHER_KERNELS) * constants.kernel_seconds
        seconds += workload.kv_bytes * min(context / workload.context, 1.0) / self._bandwidth
        flops = 4 * spec.layers * spec.heads * spec.head_dim * context * tokens
        seconds += flops / (constants.flops_share * self._flops)
        groups: dict[str, list[Matrix]] = {}
        for matrix in targets:
            groups.setdefault((self._joined and model.fused[matrix.name]) or matrix.name, []).append(matrix)
        for group in groups.values():
            K, least = group[0].K, self._constants.packed["int4"]
            seconds -= (len(group) - 1) * (least.floor_seconds + least.input_seconds * K)  # each was counted alone
            seconds += self.lora_seconds(sum(matrix.N for matrix in group), K, tokens) if on else 0.0
        if tokens > workload.batch:
            nodes = (
                spec.layers * (LAYER_NODES + spec.further_norms)
                + len(groups) * (1 + (LORA_NODES if on else 0))
                + OTHER_KERNELS
            )
            products = sum(self._dense(matrix.N, matrix.K, tokens) for matrix in targets)
            seconds = max(seconds, nodes * constants.launch_seconds - products)
        return seconds + 4 * spec.vocabulary * workload.batch * constants.host_seconds_per_byte
