"""Matrix products of ONNX Runtime by weight format: random weights, nodes, and the float32 weights they stand for."""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

__all__ = ["E2M1", "SPREAD", "Graph", "Weight", "random_weight"]

NF4 = np.array(
    [
        -1.0,
        -0.6961928,
        -0.52507305,
        -0.39491749,
        -0.28444138,
        -0.18477343,
        -0.09105004,
        0.0,
        0.0795803,
        0.1609302,
        0.2461123,
        0.33791524,
        0.44070983,
        0.562617,
        0.72295684,
        1.0,
    ],
    np.float32,
)
"""The table of MatMulBnb4 (bitsandbytes)."""
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_KINDS = {
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(ml_dtypes.float8_e4m3fn): TensorProto.FLOAT8E4M3FN,
}
_PERIOD = 3_000_017
"""Normal numbers drawn for one weight; a larger one repeats them, which its speed does not depend on."""
SPREAD = 0.02
"""Standard deviation of the random weights, roughly."""


@dataclass(frozen=True)
class Weight:
    """Random weights of one shape in one format.

    Args:
        op: operator type.
        domain: its domain.
        arrays: input name → array, behind the activations.
        attributes: of the node.
        N: output width.
        K: input width.
    """

    op: str
    domain: str
    arrays: dict[str, NDArray[Any]]
    attributes: dict[str, Any]
    N: int
    K: int

    @property
    def nbytes(self) -> int:
        """Bytes of the weights and scales."""
        return sum(array.nbytes for array in self.arrays.values())

    def dense(self, rows: int) -> NDArray[np.float32]:
        """Return the first rows of the float32 weight [N, K] that the arrays stand for."""
        named, K = self.arrays, self.K
        if self.op == "MatMul":
            return named["weight"][:, :rows].astype(np.float32).T
        scales = named["scales"].reshape(self.N, -1)[:rows]
        if self.op == "MatMulNBits":
            bits = self.attributes["bits"]
            codes = _unpacked(named["codes"][:rows], bits).astype(np.float32)
            codes = codes.reshape(*scales.shape, -1)
            zero: Any = float(2 ** (bits - 1))
            if "zeros" in named:
                zeros = _unpacked(named["zeros"][:rows], bits)[:, : scales.shape[1]]
                zero = zeros[:, :, None].astype(np.float32)
            levels = codes - zero
        elif self.op == "MatMulBlockQuantizedFp4Weight":
            levels = E2M1[_unpacked(named["codes"][:rows], 4)].reshape(*scales.shape, -1)
            scales = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * named["scale"][0]
        elif self.op == "MatMulBlockQuantizedFp8Weight":
            levels = named["codes"][:rows].astype(np.float32).reshape(*scales.shape, -1)
        else:
            codes = named["codes"].reshape(self.N, -1)[:rows]
            levels = NF4[np.stack([codes >> 4, codes & 15], axis=-1)].reshape(*scales.shape, -1)
        return (levels * scales.astype(np.float32)[:, :, None]).reshape(len(scales), K)


def _unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Return codes packed along the last axis, low bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).reshape(*packed.shape[:-1], -1)


@cache
def random_weight(text: str, N: int, K: int) -> Weight:
    """Return random weights; the same object for the same arguments, so that layers share host memory.

    Args:
        text: fp16, int2/4/8-gBLOCK, with "-zp" for zero points, nvfp4, fp8 (a scale per row), fp8-g128, nf4-g64.
        N: output width.
        K: input width; a block that does not divide it is halved until it does.
    """
    rng = np.random.default_rng(len(text) * 7 + N + K)
    kind, *parts = text.split("-")
    block = next((int(part[1:]) for part in parts if part[0] == "g"), K)
    while block > 16 and K % block:
        block //= 2

    def scales(shape: tuple[int, ...], step: float) -> NDArray[np.float32]:
        return (step * (0.5 + rng.random(shape, dtype=np.float32))).astype(np.float32)

    def signs(shape: tuple[int, ...]) -> NDArray[np.int8]:
        """Return signs for scales: the codes of integers have a mean of −0.5, which adds up over thousands."""
        return rng.integers(0, 2, shape, dtype=np.int8) * 2 - 1

    def random_bytes(*shape: int) -> NDArray[np.uint8]:
        return rng.integers(0, 256, shape, dtype=np.uint8)

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(min(int(np.prod(shape)), _PERIOD), dtype=np.float32)

    if kind == "fp16":
        weight = np.resize((normal(K, N) * SPREAD).astype(np.float16), (K, N))
        return Weight("MatMul", "", {"weight": weight}, {}, N, K)
    if kind.startswith("int"):
        bits = int(kind[3:])
        arrays: dict[str, NDArray[Any]] = {
            "codes": random_bytes(N, K // block, block * bits // 8),
            "scales": (scales((N, K // block), SPREAD * 3.5 / 2**bits) * signs((N, K // block))).astype(np.float16),
        }
        if "zp" in parts:
            arrays["zeros"] = random_bytes(N, -(-K // block * bits // 8))
        return Weight("MatMulNBits", "com.microsoft", arrays, {"bits": bits, "block_size": block, "N": N, "K": K}, N, K)
    if kind == "nvfp4":
        stored = scales((N, K // 16), 1.0).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        arrays = {"codes": random_bytes(N, K // 2), "scales": stored, "scale": np.array([SPREAD / 3], np.float32)}
        return Weight("MatMulBlockQuantizedFp4Weight", "com.microsoft", arrays, {"block_size": 16}, N, K)
    if kind == "fp8":
        codes = np.resize(normal(N, K).astype(ml_dtypes.float8_e4m3fn), (N, K))
        arrays = {"codes": codes, "scales": scales((N, K // block), SPREAD)}
        return Weight("MatMulBlockQuantizedFp8Weight", "com.microsoft", arrays, {"block_size": block}, N, K)
    if kind == "nf4":
        arrays = {"codes": random_bytes(N * K // 2), "scales": scales((N * K // block,), 0.05).astype(np.float16)}
        attributes = {"block_size": block, "quant_type": 1, "N": N, "K": K}
        return Weight("MatMulBnb4", "com.microsoft", arrays, attributes, N, K)
    raise ValueError(f"no weight format {text!r}")


@dataclass
class Graph:
    """An ONNX graph under construction; weights stay in host memory and are handed to the session.

    Args:
        opset: of ONNX's own operators.
        library: path of the custom operators that its nodes need.
    """

    opset: int = 21
    library: str = ""
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    small: list[onnx.TensorProto] = field(default_factory=list)
    weights: dict[str, NDArray[Any]] = field(default_factory=dict)

    def input(self, name: str, kind: Any, shape: list[Any]) -> str:
        """Declare a graph input of a numpy dtype."""
        self.inputs.append(helper.make_tensor_value_info(name, _KINDS[np.dtype(kind)], shape))
        return name

    def output(self, name: str, kind: Any, shape: list[Any]) -> str:
        """Declare a graph output of a numpy dtype."""
        self.outputs.append(helper.make_tensor_value_info(name, _KINDS[np.dtype(kind)], shape))
        return name

    def constant(self, name: str, array: NDArray[Any]) -> str:
        """Add a small constant."""
        self.small.append(onnx.numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str, array: NDArray[Any]) -> str:
        """Add an initializer whose bytes the session gets from memory."""
        self.weights[name] = array
        return name

    def node(self, op: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> str:
        """Add a node and return its first output."""
        made = helper.make_node(op, inputs, outputs, name=outputs[0], domain=domain, **attributes)
        self.nodes.append(made)
        return outputs[0]

    def product(self, x: str, weight: Weight, name: str) -> str:
        """Add x·W and return its name."""
        stored = [self.weight(f"{name}.{part}", array) for part, array in weight.arrays.items()]
        return self.node(weight.op, [x, *stored], [name], weight.domain, **weight.attributes)

    def model(self) -> onnx.ModelProto:
        """Return the model; its weights are declared as external data."""
        held = []
        for name, array in self.weights.items():
            tensor = TensorProto(name=name, data_type=_KINDS[array.dtype], dims=array.shape)
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="weights")
            held.append(tensor)
        graph = helper.make_graph(self.nodes, "graph", self.inputs, self.outputs, [*self.small, *held])
        domains = {"com.microsoft"} | {node.domain for node in self.nodes if node.domain}
        imports = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(name, 1) for name in sorted(domains))]
        return helper.make_model(graph, opset_imports=imports, ir_version=10)
