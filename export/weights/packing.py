"""Codes of 2, 3, 4 or 8 bits in planes of bytes, and the graph that reads them back.

A code is cut into planes of 1, 2, 4 or 8 bits. A plane of w bits packs 8/w codes into a byte: the packed axis of
length L is cut into 8/w segments, and byte i holds element i of every segment, the first in the low bits. Bytes are
stored as byte − 128 in INT8: TensorRT keeps constants packed only if DequantizeLinear alone reads them, and INT8 is
the one carrier it takes on every GPU.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from coatrt.export.graph import GraphBuilder
from coatrt.export.weights.base import byte_lookup, gather_rows

__all__ = ["PLANES", "PackedCodes", "pack_plane"]

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}  # bits of a code → bits of its planes, low bits first
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
        name: prefix of the names.
        bits: bits of a code.
        axis: the packed axis of the 2-D codes, 0 or 1.
        shape: of the codes, unpacked.
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
            stored = graph.store(
                f"{name}.plane{shift}", packed, ir.DataType.INT8 if graph.is_engine else ir.DataType.UINT8
            )
            if graph.is_engine:
                # One reader for all uses; DequantizeLinear with scale 1 gives the byte − 128, exact in every dtype.
                stored = graph.op("DequantizeLinear", [stored, graph.real(1.0)], f"{name}.plane{shift}.values")
            planes.append(stored)
            shift += width
        return cls(graph, name, bits, axis, (int(codes.shape[0]), int(codes.shape[1])), tuple(planes))

    def lookup(self, levels: NDArray[np.float32] | None, ids: ir.Value | None, name: str) -> ir.Value:
        """Return what the codes stand for, in the activations' dtype.

        Args:
            levels: [2^bits] value by code; None for the code itself.
            ids: [B, S] rows to take (codes packed along axis 1); None for all codes.
            name: prefix of the new names.

        Returns:
            the codes' shape, or [B, S, shape[1]] with ids.
        """
        planes = [gather_rows(self.graph, plane, ids, f"{name}.rows{i}") for i, plane in enumerate(self.planes)]
        table = np.arange(1 << self.bits, dtype=np.float32) if levels is None else levels
        if self.graph.is_engine:
            codes = self._join([self._unpack(plane, i, ids, name) for i, plane in enumerate(planes)], name)
            if levels is None:
                return self.graph.op("Cast", [codes], f"{name}.values", to=self.graph.activations)
        elif len(planes) == 1:
            return self._ordered(byte_lookup(self.graph, planes[0], table[_parts(self.bits)], name), ids, name)
        else:
            codes = self._join([self._byte_codes(plane, i, ids, name) for i, plane in enumerate(planes)], name)
        return self.graph.op("Gather", [self.graph.real(table), codes], f"{name}.levels", axis=0)

    def _join(self, parts: list[ir.Value], name: str) -> ir.Value:
        joined = parts[0]
        for i, part in enumerate(parts[1:], 1):
            joined = self.graph.op("Add", [joined, part], f"{name}.joined{i}")
        return joined

    def _shift(self, plane: int) -> int:
        return sum(PLANES[self.bits][:plane])

    def _unpack(self, values: ir.Value, plane: int, ids: ir.Value | None, name: str) -> ir.Value:
        """Engine form: unpack with integer arithmetic, which stays between the packed constant and its use."""
        graph, width = self.graph, PLANES[self.bits][plane]
        name = f"{name}.unpack{plane}"

        def integer(value: int) -> ir.Value:
            return graph.constant(np.array(value, np.int32))

        signed = graph.op("Cast", [values], f"{name}.signed", to=ir.DataType.INT32)
        rest = graph.op("Add", [signed, integer(_BIAS)], f"{name}.byte")
        parts = []
        for position in range(8 // width - 1, 0, -1):
            unit = integer(1 << (width * position))
            high = graph.op("Div", [rest, unit], f"{name}.high{position}")
            part = graph.op("Mul", [high, unit], f"{name}.part{position}")
            rest = graph.op("Sub", [rest, part], f"{name}.low{position}")
            parts.append(high)
        parts.append(rest)
        if len(parts) > 1:
            rest = graph.op("Concat", parts[::-1], f"{name}.codes", axis=self.axis if ids is None else 2)
        if self._shift(plane):
            rest = graph.op("Mul", [rest, integer(1 << self._shift(plane))], f"{name}.shifted")
        return rest

    def _byte_codes(self, stored: ir.Value, plane: int, ids: ir.Value | None, name: str) -> ir.Value:
        """Cpu form: one Gather gives the parts of a byte, already shifted to their place in the code."""
        graph, name = self.graph, f"{name}.unpack{plane}"
        parts = (_parts(PLANES[self.bits][plane]) << self._shift(plane)).astype(np.int32)
        index = graph.op("Cast", [stored], f"{name}.index", to=ir.DataType.INT32)
        return self._ordered(graph.op("Gather", [graph.constant(parts), index], f"{name}.parts", axis=0), ids, name)

    def _ordered(self, parts: ir.Value, ids: ir.Value | None, name: str) -> ir.Value:
        """Return parts [..., n], n = values per byte, with the segments one after the other along the packed axis."""
        if ids is not None:
            order, shape = [0, 1, 3, 2], [0, 0, self.shape[1]]  # 0 copies the dimension
        else:
            order, shape = ([2, 0, 1] if self.axis == 0 else [0, 2, 1]), list(self.shape)
        moved = self.graph.op("Transpose", [parts], f"{name}.segments", perm=order)
        return self.graph.op("Reshape", [moved, self.graph.ints(*shape)], f"{name}.ordered")


def _parts(width: int) -> NDArray[np.int64]:
    """Return [256, 8 / width]: the codes in each stored byte of a plane."""
    byte = np.arange(256)[:, None] ^ _BIAS
    return byte >> (np.arange(8 // width) * width) & ((1 << width) - 1)
