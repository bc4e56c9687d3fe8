"""16-bit weights: stored as they are, cast where the activations have another dtype."""

import onnx_ir as ir
import torch

from coatrt.export.graph import GraphBuilder
from coatrt.export.weights.base import Rows, gather_rows, transposed
from coatrt.quantization.codec import QuantizedMatrix

__all__ = ["rows", "weight"]

_DTYPES = {torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}


def _stored(graph: GraphBuilder, name: str, dtype: ir.DataType) -> str:
    """Return the name of a value as it is stored; `name` itself is the value in the activations' dtype."""
    return name if dtype == graph.activations else f"{name}.values"


def weight(graph: GraphBuilder, name: str, matrix: QuantizedMatrix) -> ir.Value:
    """Return the weight [K, N]."""
    dtype = _DTYPES[matrix.codes.dtype]
    stored = graph.store(_stored(graph, name, dtype), transposed(matrix.codes), dtype)
    return graph.cast(stored, name)


def rows(graph: GraphBuilder, name: str, matrix: QuantizedMatrix) -> Rows:
    """Return the table's rows; a tied head reads the same stored values."""
    dtype = _DTYPES[matrix.codes.dtype]
    stored = graph.store(f"{name}.values", matrix.codes.contiguous(), dtype)

    def read(ids: ir.Value | None, label: str) -> ir.Value:
        if ids is None:
            return graph.cast(stored, name)
        taken = gather_rows(graph, stored, ids, _stored(graph, label, dtype))
        return graph.cast(taken, label) if taken.name != label else taken

    return read
