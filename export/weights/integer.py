"""INT8 and INT4: DequantizeLinear, which TensorRT keeps packed and ONNX Runtime fuses into MatMulNBits."""

import numpy as np
import onnx_ir as ir
import torch

from coatrt.export.graph import GraphBuilder
from coatrt.export.weights.base import (
    Rows,
    block_dequantized,
    byte_rows,
    gather_rows,
    nibbles,
    transposed,
)
from coatrt.export.weights.scales import write_scales
from coatrt.quantization.codec import QuantizedMatrix

__all__ = ["rows", "weight"]

_SIGNED = np.arange(256, dtype=np.uint8).view(np.int8)
_HALVES = np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=1)  # low half first
_BYTE_VALUES = {
    "int8": _SIGNED[:, None].astype(np.float32),
    "int4": np.where(_HALVES > 7, _HALVES - 16, _HALVES).astype(np.float32),
}


def _store(graph: GraphBuilder, name: str, codes: torch.Tensor, kind: str) -> ir.Value:
    if kind == "int8":
        return graph.store(name, codes.contiguous(), ir.DataType.INT8)
    return graph.store(name, nibbles(codes), ir.DataType.INT4, codes.shape)


def _cut(graph: GraphBuilder, matrix: QuantizedMatrix) -> torch.Tensor:
    """Return the codes as DequantizeLinear gets them: TensorRT needs more than one block to be whole."""
    whole = graph.is_engine and (matrix.format.kind == "int4" or matrix.K > matrix.format.block)
    return matrix.codes if whole else matrix.codes[:, : matrix.K]


def _dequantized(
    graph: GraphBuilder, codes: ir.Value, scales: ir.Value, matrix: QuantizedMatrix, axis: int, name: str
) -> ir.Value:
    """Return codes × scales; one scale per channel lies along the other axis, flat."""
    fmt = matrix.format
    # TensorRT-RTX 1.7.1 fails on INT8 with a single block along K (Myelin "is_value()"); per channel is the same.
    if fmt.block and (fmt.kind == "int4" or matrix.K > fmt.block):
        return block_dequantized(graph, codes, scales, matrix, axis, name)
    flat = graph.op("Reshape", [scales, graph.ints(matrix.N)], f"{name}.channel_scales")
    return graph.op("DequantizeLinear", [codes, flat], name, axis=1 - axis)


def weight(graph: GraphBuilder, name: str, matrix: QuantizedMatrix) -> ir.Value:
    """Return the weight [K, N]; both forms read the same bytes where blocks are whole."""
    codes = _store(graph, f"{name}.codes", transposed(_cut(graph, matrix)), matrix.format.kind)
    return _dequantized(graph, codes, write_scales(graph, name, matrix, by_rows=False), matrix, 0, name)


def rows(graph: GraphBuilder, name: str, matrix: QuantizedMatrix) -> Rows:
    """Return the table's rows, of which a tied head reads all for TensorRT."""
    kind, prefix = matrix.format.kind, f"{name}.table"
    scales = write_scales(graph, prefix, matrix, by_rows=True)
    if graph.is_engine:
        codes = _store(graph, f"{prefix}.codes", _cut(graph, matrix).contiguous(), kind)
        whole = _dequantized(graph, codes, scales, matrix, 1, prefix)
        return lambda ids, label: gather_rows(graph, whole, ids, label)
    width = matrix.codes.shape[1]
    packed = matrix.codes.view(torch.uint8) if kind == "int8" else nibbles(matrix.codes).view(-1, width // 2)
    stored = graph.store(f"{prefix}.codes", packed.contiguous(), ir.DataType.UINT8)
    return byte_rows(graph, stored, _BYTE_VALUES[kind], scales, matrix, f"{name}.row_codes")
