"""Block scales in a graph: float16 as stored, or quantized themselves (double quantization)."""

import onnx_ir as ir

from coatrt.export.graph import GraphBuilder
from coatrt.export.weights.base import transposed
from coatrt.export.weights.packing import PackedCodes
from coatrt.quantization.codec import QuantizedMatrix

__all__ = ["SUPER_DTYPES", "write_scales"]

SUPER_DTYPES = {"bf16": ir.DataType.BFLOAT16, "fp16": ir.DataType.FLOAT16, "fp32": ir.DataType.FLOAT}


def write_scales(graph: GraphBuilder, name: str, matrix: QuantizedMatrix, by_rows: bool) -> ir.Value:
    """Store the scales of a matrix and return them in the activations' dtype.

    Args:
        graph: the graph.
        name: name of the matrix.
        matrix: any format with float16 or doubly quantized scales.
        by_rows: True for [N, blocks] (tables), False for [blocks, N] (weights of MatMul).

    Returns:
        the scales; code × super scale, rounded, + offset, rounded, under double quantization.
    """
    assert matrix.scales is not None
    if matrix.super_scales is None:
        stored = matrix.scales.contiguous() if by_rows else transposed(matrix.scales)
        return graph.cast(graph.store(f"{name}.scales", stored, ir.DataType.FLOAT16), f"{name}.scales.cast")
    fmt = matrix.format
    blocks = fmt.padded(matrix.K) // fmt.block
    packed = PackedCodes.store(graph, f"{name}.scales", matrix.scales, fmt.scale_bits, axis=1)
    values = packed.lookup(None, None, f"{name}.scales")
    supers = graph.store(f"{name}.super_scales", matrix.super_scales.reshape(-1, 1), SUPER_DTYPES[fmt.scale_dtype])
    steps = graph.rounded("Mul", values, graph.cast(supers, f"{name}.super_scales.cast"), f"{name}.scales.steps")
    shifted = graph.rounded("Add", steps, graph.real(matrix.constant), f"{name}.scales.padded")
    flat = graph.op("Reshape", [shifted, graph.ints(-1)], f"{name}.scales.flat")
    if matrix.scales.numel() != matrix.N * blocks:
        flat = graph.op("Slice", [flat, graph.ints(0), graph.ints(matrix.N * blocks)], f"{name}.scales.used")
    rows = graph.op("Reshape", [flat, graph.ints(matrix.N, blocks)], f"{name}.scales.rows")
    return rows if by_rows else graph.op("Transpose", [rows], f"{name}.scales.columns", perm=[1, 0])
