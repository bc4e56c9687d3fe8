"""How weights are stored in a graph, one module per storage; `STORAGES` maps format kinds to modules."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from coatrt.export.graph import GraphBuilder
from coatrt.export.weights import codes, floats, normal_float
from coatrt.export.weights.base import Storage
from coatrt.quantization.codec import QuantizedMatrix

__all__ = ["STORAGES", "Table", "write_matrix", "write_table"]

STORAGES: Mapping[str, Storage] = {
    "fp16": floats,
    "bf16": floats,
    "int8": codes,
    "int4": codes,
    "fp8": codes,
    "nvfp4": codes,
    "nf2": normal_float,
    "nf3": normal_float,
    "nf4": normal_float,
    "nf8": normal_float,
}


def write_matrix(graph: GraphBuilder, name: str, matrix: QuantizedMatrix) -> ir.Value:
    """Store a matrix and return its weight [K, N] in the activations' dtype, named `{name}.weight`."""
    return STORAGES[matrix.format.kind].weight(graph, f"{name}.weight", matrix)


@dataclass(frozen=True)
class Table:
    """An embedding table in a graph.

    Args:
        rows: input ids [B, S] → embeddings [B, S, H].
        weight: the same table as the head's weight [H, V]; None if the head is not tied.
    """

    rows: Callable[[ir.Value], ir.Value]
    weight: ir.Value | None


def write_table(graph: GraphBuilder, name: str, matrix: QuantizedMatrix, head: bool) -> Table:
    """Store an embedding table [N = V, K = H] once and return it; with `head`, also as a tied head's weight."""
    storage, name = STORAGES[matrix.format.kind], f"{name}.weight"
    rows = storage.rows(graph, name, matrix)
    weight = None
    if head and matrix.format.kind in codes.INTEGERS and not graph.is_engine:  # separate codes, for MatMulNBits
        weight = storage.weight(graph, f"{name}.head", matrix)
    elif head:
        weight = graph.op("Transpose", [rows(None, f"{name}.table")], f"{name}.head", perm=[1, 0])
    return Table(lambda ids: rows(ids, f"{name}.rows"), weight)
