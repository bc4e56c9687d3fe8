"""Codes of 2, 3, 4 or 8 bits packed in planes of bytes, and the graph nodes that unpack them.

A code is split into planes of 1, 2, 4 or 8 bits. A plane of w bits packs 8/w codes into a byte: the packed axis of
length L is split into 8/w segments, and byte i contains element i of every segment, the first in the low bits. Bytes
are stored as byte − 128 in INT8: TensorRT keeps constants packed only if DequantizeLinear alone reads them, and INT8 is
the only dtype for that on every GPU.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from coatrt.export.graph import GraphBuilder
from coatrt.export.weights.base import gather_rows

__all__ = ["PLANES", "PackedCodes", "pack_plane"]

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}  # bits per code → bits of its planes, low bits first
_BIAS = 128


def pack_plane(codes: torch.Tensor, shift: int, width: int, axis: int) -> torch.Tensor:
    """Return one plane of codes, packed and biased.

    Args:
        codes: uint8, 2-D; the length of `axis` is a multiple of 8 / width.
        shift: lowest bit of the plane.
        width: bits of the plane: 1, 2, 4 or 8.
        axis: the packed axis.

    Returns:
        int8, `axis` shorter by 8 / width.
    """
    per_byte = 8 // width
    parts = codes.tensor_split(per_byte, dim=axis)
    packed = torch.full_like(parts[0], _BIAS, memory_format=torch.contiguous_format)  # byte − 128 flips the top bit
    for position, part in enumerate(parts):
        packed ^= ((part >> shift) & ((1 << width) - 1)) << (position * width)
    return packed.view(torch.int8)


@dataclass(frozen=True)
class PackedCodes:
    """Packed codes in a graph.

    Args:
        graph: the graph.
        name: prefix of the node names.
        bits: bits per code.
        axis: the packed axis of the 2-D codes, 0 or 1.
        shape: shape of the unpacked codes.
        planes: one packed initializer per plane.
    """

    graph: GraphBuilder
    name: str
    bits: int
    axis: int
    shape: tuple[int, int]
    planes: tuple[ir.Value, ...]

    @classmethod
    def store(cls, graph: GraphBuilder, name: str, codes: torch.Tensor, bits: int, axis: int) -> "PackedCodes":
        """Pack uint8 `codes` (2-D) along `axis` and store them."""
        planes, shift = [], 0
        for width in PLANES[bits]:
            packed = pack_plane(codes, shift, width, axis)
            stored = graph.store(f"{name}.plane{shift}", packed, ir.DataType.INT8)
            if graph.is_engine:
                # One DequantizeLinear for all uses; with scale 1 it gives byte − 128, which is exact in every dtype.
                stored = graph.op("DequantizeLinear", [stored, graph.real(1.0)], f"{name}.plane{shift}.values")
            planes.append(stored)
            shift += width
        return cls(graph, name, bits, axis, (int(codes.shape[0]), int(codes.shape[1])), tuple(planes))

    def lookup(
        self, levels: NDArray[np.float32] | None, ids: ir.Value | None, name: str, own: bool = False
    ) -> ir.Value:
        """Return the values of the codes, in the activations' dtype.

        Args:
            levels: [2^bits], the value of each code; None for the code itself.
            ids: [B, S] rows to read (codes packed along axis 1); None for all codes.
            name: prefix of the node names.
            own: whether no other matrix has these levels. Then codes are unpacked first, by a table that all share:
                with a table of values for each matrix, engines took 20 kB a matrix more.

        Returns:
            the codes' shape, or [B, S, shape[1]] with ids.
        """
        planes = [gather_rows(self.graph, plane, ids, f"{name}.rows{i}") for i, plane in enumerate(self.planes)]
        table = np.arange(1 << self.bits, dtype=np.float32) if levels is None else levels
        if len(planes) == 1 and not own:
            return self._unpack(planes[0], self.graph.real(table[_parts(self.bits)]), ids, name)
        codes = self._unpack(planes[0], self._code_parts(0), ids, f"{name}.plane0")
        for i, plane in enumerate(planes[1:], 1):
            part = self._unpack(plane, self._code_parts(i), ids, f"{name}.plane{i}")
            codes = self.graph.op("Add", [codes, part], f"{name}.joined{i}")
        return self.graph.op("Gather", [self.graph.real(table), codes], f"{name}.levels", axis=0)

    def _code_parts(self, plane: int) -> ir.Value:
        """Return [8 / width, 256]: the codes in each byte of a plane, shifted to their bits in the whole code."""
        widths = PLANES[self.bits]
        return self.graph.constant((_parts(widths[plane]) << sum(widths[:plane])).astype(np.int32))

    def _unpack(self, plane: ir.Value, table: ir.Value, ids: ir.Value | None, name: str) -> ir.Value:
        """Return the values of a plane's bytes, by one Gather from a table [8 / width, 256] for all segments.

        With unpacking by arithmetic, TensorRT-RTX 1.7.1 took up to three times as long to build an engine.
        """
        graph = self.graph
        index = graph.op("Cast", [plane], f"{name}.index", to=ir.DataType.INT32)
        index = graph.op("Add", [index, graph.constant(np.array(_BIAS, np.int32))], f"{name}.byte")
        parts = graph.op("Gather", [table, index], f"{name}.parts", axis=1)
        order, shape = ([1, 0, 2], self.shape) if ids is None else ([1, 2, 0, 3], (0, 0, self.shape[1]))
        if ids is not None or self.axis == 1:  # concatenate the segments along the last axis; 0 copies a dimension
            parts = graph.op("Transpose", [parts], f"{name}.segments", perm=order)
        return graph.op("Reshape", [parts, graph.ints(*shape)], f"{name}.ordered")


def _parts(width: int) -> NDArray[np.int64]:
    """Return [8 / width, 256]: the codes in each byte of a plane."""
    return np.arange(256) >> (np.arange(8 // width)[:, None] * width) & ((1 << width) - 1)
