"""What every weight storage offers, and the pieces they share: scales, byte tables, nibbles."""

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
    "cut",
    "gather_rows",
    "nibbles",
    "scaled",
    "scaled_rows",
    "transposed",
]


Rows = Callable[[ir.Value | None, str], ir.Value]
"""(input ids [B, S], name) → embeddings [B, S, H] of that name; without ids the whole table [V, H]."""


class Storage(Protocol):
    """A file of this folder: how its formats are written into a graph; decoded they equal `codec.decode`."""

    def weight(self, graph: GraphBuilder, name: str, matrix: QuantizedMatrix) -> ir.Value:
        """Return the weight [K, N] for MatMul, in the activations' dtype."""

    def rows(self, graph: GraphBuilder, name: str, matrix: QuantizedMatrix) -> Rows:
        """Store an embedding table [V, H] and return what reads it, in the activations' dtype."""


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """Return the contiguous transpose of a matrix; 8-bit floats keep their bytes."""
    if tensor.element_size() == 1:
        return tensor.view(torch.uint8).t().contiguous().view(tensor.dtype)
    return tensor.t().contiguous()


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Return 4-bit codes (int8 or uint8, any shape) packed flat as ONNX does: two a byte, the first in the low half."""
    flat = codes.reshape(-1).view(torch.uint8)
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return (flat[1::2] << 4).bitwise_or_(flat[0::2] & 15)


def gather_rows(graph: GraphBuilder, table: ir.Value, ids: ir.Value | None, name: str) -> ir.Value:
    """Return the rows of `table` that `ids` names, or the whole table without ids."""
    return table if ids is None else graph.op("Gather", [table, ids], name, axis=0)


def cut(graph: GraphBuilder, value: ir.Value, matrix: QuantizedMatrix, axis: int, name: str) -> ir.Value:
    """Return `value` without what pads K to whole blocks along `axis`."""
    return graph.op("Slice", [value, graph.ints(0), graph.ints(matrix.K), graph.ints(axis)], name)


def byte_lookup(graph: GraphBuilder, stored: ir.Value, values: NDArray[np.float32], name: str) -> ir.Value:
    """Return what each stored byte stands for, cpu form: one Gather that ONNX Runtime folds for constants.

    Args:
        graph: graph in the cpu form.
        stored: uint8, any shape.
        values: [256, n]: the n values that a byte packs, in order.
        name: prefix of the new names.

    Returns:
        shape of `stored` with a new last axis n, in the activations' dtype.
    """
    index = graph.op("Cast", [stored], f"{name}.index", to=ir.DataType.INT32)
    return graph.op("Gather", [graph.real(values), index], f"{name}.levels", axis=0)


def scaled(graph: GraphBuilder, levels: ir.Value, scales: ir.Value, matrix: QuantizedMatrix, name: str) -> ir.Value:
    """Return levels × scales as a weight [K, N], one rounding per element.

    Args:
        graph: the graph.
        levels: Kp·N values in [Kp, N] order, any shape; Kp = K where the format has no blocks.
        scales: [blocks, N], or [1, N] per channel.
        matrix: gives the shape.
        name: name of the weight.
    """
    N, width = matrix.N, matrix.format.padded(matrix.K)
    blocks = width // (matrix.format.block or width)
    levels = graph.op("Reshape", [levels, graph.ints(blocks, width // blocks, N)], f"{name}.blocks")
    scales = graph.op("Reshape", [scales, graph.ints(blocks, 1, N)], f"{name}.block_scales")
    return _multiplied(graph, levels, scales, matrix, (width, N), 0, name)


def scaled_rows(
    graph: GraphBuilder,
    levels: ir.Value,
    scales: ir.Value,
    matrix: QuantizedMatrix,
    ids: ir.Value | None,
    name: str,
) -> ir.Value:
    """Return levels × scales as table rows, one rounding per element.

    Args:
        graph: the graph.
        levels: [B, S, …] or, without ids, [V, …]; Hp values in the axes behind.
        scales: [V, blocks], or [V, 1] per channel.
        matrix: gives the shape.
        ids: [B, S] the rows to take; None for the whole table.
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
    return _multiplied(graph, levels, scales, matrix, (*lead, width), -1, name)


def _multiplied(
    graph: GraphBuilder,
    levels: ir.Value,
    scales: ir.Value,
    matrix: QuantizedMatrix,
    shape: Sequence[int],
    axis: int,
    name: str,
) -> ir.Value:
    """Return levels × scales, given in blocks, in a `shape` of whole blocks, and then cut to K along `axis`."""
    product = graph.rounded("Mul", levels, scales, f"{name}.product")
    if matrix.format.padded(matrix.K) == matrix.K:
        return graph.op("Reshape", [product, graph.ints(*shape)], name)
    return cut(graph, graph.op("Reshape", [product, graph.ints(*shape)], f"{name}.padded"), matrix, axis, name)
