"""16-bit weights: stored as they are, cast where the activations have another dtype."""

import onnx_ir as ir
import torch

from coatrt.export.graph import GraphBuilder
from coatrt.export.weights.base import Table, gather_rows, transposed
from coatrt.quantization.codec import QuantizedMatrix

__all__ = ["FloatStorage"]

_DTYPES = {torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}


def _stored(graph: GraphBuilder, name: str, dtype: ir.DataType) -> str:
    """Return the name of a value as it is stored; `name` itself is the value in the activations' dtype."""
    return name if dtype == graph.activations else f"{name}.values"


class FloatStorage:
    """fp16 and bf16."""

    def matrix(self, graph: GraphBuilder, name: str, matrix: QuantizedMatrix) -> ir.Value:
        """Return the weight [K, N]."""
        dtype = _DTYPES[matrix.codes.dtype]
        stored = graph.store(_stored(graph, name, dtype), transposed(matrix.codes), dtype)
        return graph.cast(stored, name)

    def table(self, graph: GraphBuilder, name: str, matrix: QuantizedMatrix, head: bool) -> Table:
        """Return the table; a tied head reads the same stored values."""
        stored = graph.store(f"{name}.values", matrix.codes.contiguous(), _DTYPES[matrix.codes.dtype])

        def rows(ids: ir.Value) -> ir.Value:
            label = f"{name}.rows"
            taken = gather_rows(graph, stored, ids, _stored(graph, label, _DTYPES[matrix.codes.dtype]))
            return graph.cast(taken, label) if taken.name != label else taken

        weight = graph.op("Transpose", [graph.cast(stored, name)], f"{name}.head", perm=[1, 0]) if head else None
        return Table(rows, weight)
