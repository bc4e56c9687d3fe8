"""Scales in a graph: float16, double quantized, or FP8 (nvfp4)."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from coatrt.export.graph import GraphBuilder
from coatrt.export.weights.base import byte_lookup, transpose
from coatrt.export.weights.packing import PackedCodes
from coatrt.quantization.codec import QuantizedMatrix

__all__ = ["E4M3_VALUES", "write_scales"]

E4M3_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)[:, None]
_SUPER_DTYPES = {"bf16": ir.DataType.BFLOAT16, "fp16": ir.DataType.FLOAT16, "fp32": ir.DataType.FLOAT}


def write_scales(graph: GraphBuilder, name: str, matrix: QuantizedMatrix, by_rows: bool) -> ir.Value:
    """Store the scales of a matrix and return them in the activations' dtype.

    The shape is [N, blocks] for tables (`by_rows`), [blocks, N] for weights of MatMul. With double quantization a scale
    is code × super scale + offset, rounded after the product and after the sum.
    """
    assert matrix.scales is not None
    fmt = matrix.format
    if matrix.super_scales is None:
        stored = matrix.scales.contiguous() if by_rows else transpose(matrix.scales)
        if fmt.kind == "nvfp4":
            return _write_e4m3(graph, f"{name}.scales", stored, matrix.constant)
        return graph.cast(graph.store(f"{name}.scales", stored, ir.DataType.FLOAT16), f"{name}.scales.cast")
    blocks = fmt.padded(matrix.K) // fmt.block
    packed = PackedCodes.store(graph, f"{name}.scales", matrix.scales, fmt.scale_bits, axis=1)
    values = packed.lookup(None, None, f"{name}.scales")
    supers = graph.store(f"{name}.super_scales", matrix.super_scales.reshape(-1, 1), _SUPER_DTYPES[fmt.scale_dtype])
    steps = graph.rounded("Mul", values, graph.cast(supers, f"{name}.super_scales.cast"), f"{name}.scales.steps")
    shifted = graph.rounded("Add", steps, graph.real(matrix.constant), f"{name}.scales.padded")
    flat = graph.op("Reshape", [shifted, graph.ints(-1)], f"{name}.scales.flat")
    if matrix.scales.numel() != matrix.N * blocks:
        flat = graph.op("Slice", [flat, graph.ints(0), graph.ints(matrix.N * blocks)], f"{name}.scales.used")
    rows = graph.op("Reshape", [flat, graph.ints(matrix.N, blocks)], f"{name}.scales.rows")
    return rows if by_rows else graph.op("Transpose", [rows], f"{name}.scales.columns", perm=[1, 0])


def _write_e4m3(graph: GraphBuilder, name: str, stored: torch.Tensor, constant: float) -> ir.Value:
    """Return E4M3 × tensor scale in the activations' dtype: exact unless it is not a power of two."""
    unit = graph.real(constant)
    if graph.is_engine:
        scales = graph.store(name, stored, ir.DataType.FLOAT8E4M3FN)
        return graph.op("DequantizeLinear", [scales, unit], f"{name}.values")
    scales = graph.store(name, stored.view(torch.uint8), ir.DataType.UINT8)
    values = byte_lookup(graph, scales, E4M3_VALUES, name)
    values = graph.op("Reshape", [values, graph.ints(*stored.shape)], f"{name}.levels.flat")
    return graph.rounded("Mul", values, unit, f"{name}.values")
