"""One file per way to store a weight; `STORAGES` maps the kinds of `coatrt.quantization.weight_format` to them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from coatrt.export.graph import GraphBuilder
from coatrt.export.weights.base import Storage
from coatrt.export.weights.float import FloatStorage
from coatrt.export.weights.fp8 import Fp8Storage
from coatrt.export.weights.integer import IntegerStorage
from coatrt.export.weights.normal_float import NormalFloatStorage
from coatrt.export.weights.nvfp4 import NvFp4Storage
from coatrt.quantization.codec import QuantizedMatrix

__all__ = ["STORAGES", "Table", "write_matrix", "write_table"]

_float, _integer, _normal_float = FloatStorage(), IntegerStorage(), NormalFloatStorage()
STORAGES: Mapping[str, Storage] = {
    "fp16": _float,
    "bf16": _float,
    "int8": _integer,
    "int4": _integer,
    "fp8": Fp8Storage(),
    "nvfp4": NvFp4Storage(),
    "nf2": _normal_float,
    "nf3": _normal_float,
    "nf4": _normal_float,
    "nf8": _normal_float,
}


def write_matrix(graph: GraphBuilder, name: str, matrix: QuantizedMatrix) -> ir.Value:
    """Store a matrix and return its weight [K, N] in the activations' dtype, named `{name}.weight`.

    Args:
        graph: the graph.
        name: name of the matrix.
        matrix: the encoded matrix.
    """
    return STORAGES[matrix.format.kind].matrix(graph, f"{name}.weight", matrix)


@dataclass(frozen=True)
class Table:
    """An embedding table in a graph.

    Args:
        rows: input ids [B, S] → embeddings [B, S, H].
        weight: the same table as the head's weight [H, V]; None unless it was asked for.
    """

    rows: Callable[[ir.Value], ir.Value]
    weight: ir.Value | None


def write_table(graph: GraphBuilder, name: str, matrix: QuantizedMatrix, head: bool) -> Table:
    """Store an embedding table once and return it, with the transpose [H, V] for a tied head where `head` is true.

    Args:
        graph: the graph.
        name: name of the matrix.
        matrix: the encoded table, N = V rows of K = H values.
        head: whether a tied head reads the table.
    """
    storage, name = STORAGES[matrix.format.kind], f"{name}.weight"
    rows = storage.rows(graph, name, matrix)
    weight = None
    if head and storage is _integer and not graph.is_engine:  # codes of its own, which ONNX Runtime fuses
        weight = storage.matrix(graph, f"{name}.head", matrix)
    elif head:
        weight = graph.op("Transpose", [rows(None, f"{name}.table")], f"{name}.head", perm=[1, 0])
    return Table(lambda ids: rows(ids, f"{name}.rows"), weight)
