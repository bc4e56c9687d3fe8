"""One file per way to store a weight; `STORAGES` maps the kinds of `coatrt.quantization.weight_format` to them."""

from collections.abc import Mapping

import onnx_ir as ir

from coatrt.export.graph import GraphBuilder
from coatrt.export.weights.base import Storage, Table
from coatrt.export.weights.float import FloatStorage
from coatrt.export.weights.fp8 import Fp8Storage
from coatrt.export.weights.integer import IntegerStorage
from coatrt.export.weights.normal_float import NormalFloatStorage
from coatrt.export.weights.nvfp4 import NvFp4Storage
from coatrt.quantization.codec import QuantizedMatrix

__all__ = ["STORAGES", "Storage", "Table", "write_matrix", "write_table"]

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


def write_table(graph: GraphBuilder, name: str, matrix: QuantizedMatrix, head: bool) -> Table:
    """Store an embedding table once and return it, with the transpose [H, V] for a tied head where `head` is true.

    Args:
        graph: the graph.
        name: name of the matrix.
        matrix: the encoded table, N = V rows of K = H values.
        head: whether a tied head reads the table.
    """
    return STORAGES[matrix.format.kind].table(graph, f"{name}.weight", matrix, head)
