"""INT8, INT4, FP8 (E4M3) and NVFP4: one code per weight, read by DequantizeLinear or, in the cpu form, by byte lookup.

TensorRT keeps the inputs of DequantizeLinear packed, and ONNX Runtime fuses it with the product for integers
(MatMulNBits). Elsewhere the cpu form uses each byte as an index into its 256 possible values, or pairs of values.
"""

import numpy as np
import onnx_ir as ir
import torch

from coatrt.export.graph import GraphBuilder
from coatrt.export.weights.base import (
    Rows,
    byte_lookup,
    gather_rows,
    nibbles,
    scale_rows,
    scale_weight,
    transpose,
    trim_padding,
)
from coatrt.export.weights.scales import E4M3_VALUES, write_scales
from coatrt.quantization.codebooks import E2M1
from coatrt.quantization.codec import QuantizedMatrix

__all__ = ["INTEGERS", "rows", "weight"]

INTEGERS = ("int8", "int4")
_DTYPES = {
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
    "fp8": ir.DataType.FLOAT8E4M3FN,
    "nvfp4": ir.DataType.FLOAT4E2M1,
}
_HALVES = np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=1)  # low half first
_BYTE_VALUES = {
    "int8": np.arange(256, dtype=np.uint8).view(np.int8)[:, None].astype(np.float32),
    "int4": np.where(_HALVES > 7, _HALVES - 16, _HALVES).astype(np.float32),
    "fp8": E4M3_VALUES,
    "nvfp4": E2M1[_HALVES],
}


def _pack(codes: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the bytes to store: 8-bit codes unchanged, 4-bit codes packed flat."""
    return nibbles(codes) if kind in ("int4", "nvfp4") else codes.contiguous()


def _store(graph: GraphBuilder, name: str, codes: torch.Tensor, kind: str) -> ir.Value:
    return graph.store(name, _pack(codes, kind), _DTYPES[kind], codes.shape)


def _whole_blocks(graph: GraphBuilder, matrix: QuantizedMatrix) -> torch.Tensor:
    """Return the codes for DequantizeLinear: padded to whole blocks where TensorRT needs that, else K wide."""
    padded = graph.is_engine and (matrix.format.kind != "int8" or matrix.K > matrix.format.block)
    return matrix.codes if padded else matrix.codes[:, : matrix.K]


def _dequantize(
    graph: GraphBuilder, codes: ir.Value, scales: ir.Value, matrix: QuantizedMatrix, axis: int, name: str
) -> ir.Value:
    """Return codes × scales by DequantizeLinear, with K along `axis`; scales per channel are along the other axis.

    TensorRT derives the block size from the two shapes, so its codes are padded to whole blocks: with K = 100 and two
    scales it would use blocks of 50. ONNX Runtime accepts a short last block, and fuses only without the slice.
    """
    fmt = matrix.format
    # TensorRT-RTX 1.7.1 fails on INT8 with a single block along K (Myelin "is_value()"); per channel is equivalent.
    if not fmt.block or (fmt.kind == "int8" and matrix.K <= fmt.block):
        flat = graph.op("Reshape", [scales, graph.ints(matrix.N)], f"{name}.channel_scales")
        return graph.op("DequantizeLinear", [codes, flat], name, axis=1 - axis)
    assert codes.shape is not None
    if codes.shape[axis] == matrix.K:
        return graph.op("DequantizeLinear", [codes, scales], name, axis=axis, block_size=fmt.block)
    values = graph.op("DequantizeLinear", [codes, scales], f"{name}.padded", axis=axis, block_size=fmt.block)
    return trim_padding(graph, values, matrix, axis, name)


def weight(graph: GraphBuilder, name: str, matrix: QuantizedMatrix) -> ir.Value:
    """Return the weight [K, N]; if blocks divide K, all forms of an integer weight share the stored bytes."""
    kind = matrix.format.kind
    if kind in INTEGERS:
        codes = _store(graph, f"{name}.codes", transpose(_whole_blocks(graph, matrix)), kind)
        return _dequantize(graph, codes, write_scales(graph, name, matrix, by_rows=False), matrix, 0, name)
    scales = write_scales(graph, name, matrix, by_rows=False)
    if graph.is_engine:
        codes = _store(graph, f"{name}.codes", transpose(matrix.codes), kind)
        return _dequantize(graph, codes, scales, matrix, 0, name)
    packed = _pack(transpose(matrix.codes), kind).view(torch.uint8)
    stored = graph.store(f"{name}.codes", packed, ir.DataType.UINT8)
    return scale_weight(graph, byte_lookup(graph, stored, _BYTE_VALUES[kind], name), scales, matrix, name)


def rows(graph: GraphBuilder, name: str, matrix: QuantizedMatrix) -> Rows:
    """Return the table's reader; a tied head shares the stored bytes, except for integers in the cpu and cuda forms."""
    kind, prefix = matrix.format.kind, f"{name}.table"
    scales = write_scales(graph, prefix, matrix, by_rows=True)
    if graph.is_engine:
        codes = _store(graph, f"{prefix}.codes", _whole_blocks(graph, matrix), kind)
        table = _dequantize(graph, codes, scales, matrix, 1, prefix)
        return lambda ids, label: gather_rows(graph, table, ids, label)
    packed = _pack(matrix.codes, kind).view(torch.uint8).view(matrix.N, -1)
    stored = graph.store(f"{prefix}.codes", packed, ir.DataType.UINT8)
    row_codes = f"{name}.row_codes" if kind in INTEGERS else f"{name}.rows.row_codes"

    def read(ids: ir.Value | None, label: str) -> ir.Value:
        codes = gather_rows(graph, stored, ids, row_codes)
        return scale_rows(graph, byte_lookup(graph, codes, _BYTE_VALUES[kind], label), scales, matrix, ids, label)

    return read
