"""The interface of weight storages, and the helpers they share: scales, byte tables, nibbles."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from coatrt.export.graph import GraphBuilder
from coatrt.quantization.codec import QuantizedMatrix

__all__ = [
    "Rows",
    "Storage",
    "byte_lookup",
    "gather_rows",
    "nibbles",
    "scale_rows",
    "scale_weight",
    "transpose",
    "trim_padding",
]


Rows = Callable[[ir.Value | None, str], ir.Value]
"""(input ids [B, S], name) → embeddings [B, S, H] of that name; without ids the whole table [V, H]."""


class Storage(Protocol):
    """A module of this folder, which writes its formats into a graph; the graph's values equal `codec.decode`."""

    def weight(self, graph: GraphBuilder, name: str, matrix: QuantizedMatrix) -> ir.Value:
        """Return the weight [K, N] for MatMul, in the activations' dtype."""

    def rows(self, graph: GraphBuilder, name: str, matrix: QuantizedMatrix) -> Rows:
        """Store an embedding table [V, H] and return its reader, which gives rows in the activations' dtype."""


def transpose(tensor: torch.Tensor) -> torch.Tensor:
    """Return the contiguous transpose of a matrix; 8-bit floats keep their bytes."""
    if tensor.element_size() == 1:
        return tensor.view(torch.uint8).t().contiguous().view(tensor.dtype)
    return tensor.t().contiguous()


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Return 4-bit codes (int8 or uint8, any shape) packed flat as in ONNX: two per byte, the first in the low half."""
    flat = codes.reshape(-1).view(torch.uint8)
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return (flat[1::2] << 4).bitwise_or_(flat[0::2] & 15)


def gather_rows(graph: GraphBuilder, table: ir.Value, ids: ir.Value | None, name: str) -> ir.Value:
    """Return the rows `ids` of `table`; without ids the whole table."""
    return table if ids is None else graph.op("Gather", [table, ids], name, axis=0)


def trim_padding(graph: GraphBuilder, value: ir.Value, matrix: QuantizedMatrix, axis: int, name: str) -> ir.Value:
    """Return `value` without the padding of K to whole blocks along `axis`."""
    return graph.op("Slice", [value, graph.ints(0), graph.ints(matrix.K), graph.ints(axis)], name)


def byte_lookup(graph: GraphBuilder, stored: ir.Value, values: NDArray[np.float32], name: str) -> ir.Value:
    """Return the values of stored bytes in the cpu form, by one Gather that ONNX Runtime folds for constants.

    Args:
        graph: graph in the cpu form.
        stored: uint8, any shape.
        values: [256, n]: the n values packed in each byte, in order.
        name: prefix of the node names.

    Returns:
        the shape of `stored` with a new last axis n, in the activations' dtype.
    """
    index = graph.op("Cast", [stored], f"{name}.index", to=ir.DataType.INT32)
    return graph.op("Gather", [graph.real(values), index], f"{name}.levels", axis=0)


def scale_weight(
    graph: GraphBuilder, levels: ir.Value, scales: ir.Value, matrix: QuantizedMatrix, name: str
) -> ir.Value:
    """Return levels × scales as a weight [K, N], rounded once per element.

    Args:
        graph: the graph.
        levels: Kp·N values in [Kp, N] order, any shape; Kp is K padded to whole blocks.
        scales: [blocks, N], or [1, N] per channel.
        matrix: gives the shape.
        name: name of the weight.
    """
    N, width = matrix.N, matrix.format.padded(matrix.K)
    blocks = width // (matrix.format.block or width)
    levels = graph.op("Reshape", [levels, graph.ints(blocks, width // blocks, N)], f"{name}.blocks")
    scales = graph.op("Reshape", [scales, graph.ints(blocks, 1, N)], f"{name}.block_scales")
    return _multiply(graph, levels, scales, matrix, (width, N), 0, name)


def scale_rows(
    graph: GraphBuilder,
    levels: ir.Value,
    scales: ir.Value,
    matrix: QuantizedMatrix,
    ids: ir.Value | None,
    name: str,
) -> ir.Value:
    """Return levels × scales as table rows, rounded once per element.

    Args:
        graph: the graph.
        levels: [B, S, …] or, without ids, [V, …]; the remaining axes have Hp values, H padded to whole blocks.
        scales: [V, blocks], or [V, 1] per channel.
        matrix: gives the shape.
        ids: [B, S] rows to read; None for the whole table.
        name: name of the rows.

    Returns:
        [B, S, H] with ids, else [V, H].
    """
    width = matrix.format.padded(matrix.K)
    blocks = width // (matrix.format.block or width)
    lead = (0, 0) if ids is not None else (matrix.N,)  # 0 copies the dimension
    levels = graph.op("Reshape", [levels, graph.ints(*lead, blocks, width // blocks)], f"{name}.blocks")
    scales = gather_rows(graph, scales, ids, f"{name}.row_scales")
    scales = graph.op("Unsqueeze", [scales, graph.ints(-1)], f"{name}.block_scales")
    return _multiply(graph, levels, scales, matrix, (*lead, width), -1, name)


def _multiply(
    graph: GraphBuilder,
    levels: ir.Value,
    scales: ir.Value,
    matrix: QuantizedMatrix,
    shape: Sequence[int],
    axis: int,
    name: str,
) -> ir.Value:
    """Return levels × scales, both in blocks, reshaped to `shape` and trimmed to K along `axis`."""
    product = graph.rounded("Mul", levels, scales, f"{name}.product")
    if matrix.format.padded(matrix.K) == matrix.K:
        return graph.op("Reshape", [product, graph.ints(*shape)], name)
    padded = graph.op("Reshape", [product, graph.ints(*shape)], f"{name}.padded")
    return trim_padding(graph, padded, matrix, axis, name)
