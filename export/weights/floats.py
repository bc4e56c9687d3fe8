"""16-bit weights: stored unchanged, cast if the activations have another dtype."""

import onnx_ir as ir
import torch

from coatrt.export.graph import GraphBuilder
from coatrt.export.weights.base import Rows, gather_rows, transpose
from coatrt.quantization.codec import QuantizedMatrix

__all__ = ["rows", "weight"]

_DTYPES = {torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}


def _stored_name(graph: GraphBuilder, name: str, dtype: ir.DataType) -> str:
    """Return the name of a stored value before its cast; `name` itself is the value in the activations' dtype."""
    return name if dtype == graph.activations else f"{name}.values"


def weight(graph: GraphBuilder, name: str, matrix: QuantizedMatrix) -> ir.Value:
    """Return the weight [K, N]."""
    dtype = _DTYPES[matrix.codes.dtype]
    stored = graph.store(_stored_name(graph, name, dtype), transpose(matrix.codes), dtype)
    return graph.cast(stored, name)


def rows(graph: GraphBuilder, name: str, matrix: QuantizedMatrix) -> Rows:
    """Return the table's reader; a tied head shares the stored values."""
    dtype = _DTYPES[matrix.codes.dtype]
    stored = graph.store(f"{name}.values", matrix.codes.contiguous(), dtype)

    def read(ids: ir.Value | None, label: str) -> ir.Value:
        if ids is None:
            return graph.cast(stored, name)
        values = gather_rows(graph, stored, ids, _stored_name(graph, label, dtype))
        return graph.cast(values, label) if values.name != label else values

    return read
