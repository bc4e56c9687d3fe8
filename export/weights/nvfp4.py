"""NVFP4: FP4 (E2M1) values, one FP8 (E4M3) scale per 16 weights, one power of two for the whole tensor.

FLOAT4E2M1 through DequantizeLinear for TensorRT; for the CPU the same bytes index the 16 values.
"""

import numpy as np
import onnx_ir as ir
import torch

from coatrt.export.graph import GraphBuilder
from coatrt.export.weights.base import (
    Rows,
    block_dequantized,
    byte_lookup,
    byte_rows,
    gather_rows,
    nibbles,
    scaled,
    transposed,
)
from coatrt.export.weights.fp8 import E4M3_VALUES
from coatrt.quantization.codebooks import E2M1
from coatrt.quantization.codec import QuantizedMatrix

__all__ = ["rows", "weight"]

_BYTE_VALUES = np.stack([E2M1[np.arange(256) & 15], E2M1[np.arange(256) >> 4]], axis=1)  # low half first


def _scales(graph: GraphBuilder, name: str, stored: torch.Tensor, constant: float) -> ir.Value:
    """Return E4M3 × tensor scale, in the activations' dtype; a power of two is exact in all of them."""
    unit = graph.real(constant)
    if graph.is_engine:
        scales = graph.store(f"{name}.scales", stored, ir.DataType.FLOAT8E4M3FN)
        return graph.op("DequantizeLinear", [scales, unit], f"{name}.scales.values")
    scales = graph.store(f"{name}.scales", stored.view(torch.uint8), ir.DataType.UINT8)
    values = byte_lookup(graph, scales, E4M3_VALUES, f"{name}.scales")
    values = graph.op("Reshape", [values, graph.ints(*stored.shape)], f"{name}.scales.levels.flat")
    return graph.rounded("Mul", values, unit, f"{name}.scales.values")


def weight(graph: GraphBuilder, name: str, matrix: QuantizedMatrix) -> ir.Value:
    """Return the weight [K, N]."""
    assert matrix.scales is not None
    scales = _scales(graph, name, transposed(matrix.scales), matrix.constant)
    codes = transposed(matrix.codes)  # whole blocks: 16·N codes fill whole bytes
    if graph.is_engine:
        stored = graph.store(f"{name}.codes", nibbles(codes), ir.DataType.FLOAT4E2M1, codes.shape)
        return block_dequantized(graph, stored, scales, matrix, 0, name)
    stored = graph.store(f"{name}.codes", nibbles(codes), ir.DataType.UINT8)
    return scaled(graph, byte_lookup(graph, stored, _BYTE_VALUES, name), scales, matrix, name)


def rows(graph: GraphBuilder, name: str, matrix: QuantizedMatrix) -> Rows:
    """Return the table's rows; a tied head reads the same stored bytes."""
    assert matrix.scales is not None
    prefix = f"{name}.table"
    scales = _scales(graph, prefix, matrix.scales.contiguous(), matrix.constant)
    if graph.is_engine:
        stored = graph.store(f"{prefix}.codes", nibbles(matrix.codes), ir.DataType.FLOAT4E2M1, matrix.codes.shape)
        whole = block_dequantized(graph, stored, scales, matrix, 1, prefix)
        return lambda ids, label: gather_rows(graph, whole, ids, label)
    packed = nibbles(matrix.codes).view(matrix.N, -1)
    stored = graph.store(f"{prefix}.codes", packed, ir.DataType.UINT8)
    return byte_rows(graph, stored, _BYTE_VALUES, scales, matrix, f"{name}.rows.row_codes")
