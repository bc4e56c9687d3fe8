"""FP8 (E4M3), one scale per output channel: DequantizeLinear for TensorRT, for the CPU bytes that index 256 values."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from coatrt.export.graph import GraphBuilder
from coatrt.export.weights.base import Rows, byte_lookup, byte_rows, gather_rows, scaled, transposed
from coatrt.export.weights.scales import write_scales
from coatrt.quantization.codec import QuantizedMatrix

__all__ = ["E4M3_VALUES", "rows", "weight"]

E4M3_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)[:, None]


def weight(graph: GraphBuilder, name: str, matrix: QuantizedMatrix) -> ir.Value:
    """Return the weight [K, N]."""
    codes, scales = transposed(matrix.codes), write_scales(graph, name, matrix, by_rows=False)
    if graph.is_engine:
        stored = graph.store(f"{name}.codes", codes, ir.DataType.FLOAT8E4M3FN)
        flat = graph.op("Reshape", [scales, graph.ints(matrix.N)], f"{name}.channel_scales")
        return graph.op("DequantizeLinear", [stored, flat], name, axis=1)
    stored = graph.store(f"{name}.codes", codes.view(torch.uint8), ir.DataType.UINT8)
    return scaled(graph, byte_lookup(graph, stored, E4M3_VALUES, name), scales, matrix, name)


def rows(graph: GraphBuilder, name: str, matrix: QuantizedMatrix) -> Rows:
    """Return the table's rows; a tied head reads the same stored bytes."""
    prefix = f"{name}.table"
    codes, scales = matrix.codes.contiguous(), write_scales(graph, prefix, matrix, by_rows=True)
    if graph.is_engine:
        stored = graph.store(f"{prefix}.codes", codes, ir.DataType.FLOAT8E4M3FN)
        flat = graph.op("Reshape", [scales, graph.ints(matrix.N)], f"{prefix}.channel_scales")
        whole = graph.op("DequantizeLinear", [stored, flat], prefix, axis=0)
        return lambda ids, label: gather_rows(graph, whole, ids, label)
    stored = graph.store(f"{prefix}.codes", codes.view(torch.uint8), ir.DataType.UINT8)
    return byte_rows(graph, stored, E4M3_VALUES, scales, matrix, f"{name}.rows.row_codes")
