"""The rotary tables of a graph: cosines and sines of every position, and the rows that the step's tokens read."""

import onnx_ir as ir
import torch

from coatrt.export.graph import GraphBuilder
from coatrt.models.families import FAMILIES
from coatrt.models.rotary import Rotary
from coatrt.models.spec import DecoderSpec

__all__ = ["RotaryTables"]


class RotaryTables:
    """Tables [rows, rotated dimensions / 2] for each set of frequencies, computed in float32 as in transformers.

    With longrope the frequencies depend on the length of the sequence: the rows for long sequences follow those for
    short ones, and a sequence that has grown long reads from there.

    Args:
        graph: receives the tables.
        spec: the decoder's architecture.
        max_positions: positions of the graph.
    """

    def __init__(self, graph: GraphBuilder, spec: DecoderSpec, max_positions: int) -> None:
        self._graph, self._spec, self._max_positions = graph, spec, max_positions
        self._used = sorted({index for index in spec.rotary if index is not None})
        self._tables: dict[int, tuple[ir.Value, ir.Value]] = {}
        self._rows: dict[int, ir.Value] = {}

    def inside(self, layer: int) -> bool:
        """Return whether GroupQueryAttention rotates a layer, which it can if both widths are multiples of 16.

        In the cuda form it derives positions from `seqlens_k`, so it cannot read the rows of long sequences.
        """
        spec, index = self._spec, self._spec.rotary[layer]
        if index is None or self._graph.is_engine or FAMILIES[spec.family].head_norms_last:
            return False
        rotary = spec.rotations[index]
        is_aligned = len(rotary.frequencies) % 8 == 0 and spec.head_dim % 16 == 0
        return is_aligned and not (self._graph.is_cuda and self._is_long(rotary))

    @property
    def needs_positions(self) -> bool:
        """Whether a layer of the cuda form reads `position_ids`."""
        layers = range(self._spec.layers)
        return any(self._spec.rotary[layer] is not None and not self.inside(layer) for layer in layers)

    def write(self, positions: ir.Value | None) -> None:
        """Add the tables; `positions` [B, S] are None if the graph does not need them."""
        for index in self._used:
            rotary, name = self._spec.rotations[index], f"rotary.{index}" if len(self._used) > 1 else "rotary"
            angles = self._angles(rotary)
            self._tables[index] = (
                self._graph.small(f"{name}.cos", angles.cos() * rotary.scaling),
                self._graph.small(f"{name}.sin", angles.sin() * rotary.scaling),
            )
            if positions is not None:
                self._rows[index] = self._long_rows(rotary, positions, name) if self._is_long(rotary) else positions

    def tables(self, layer: int) -> tuple[ir.Value, ir.Value]:
        """Return the cosines and sines of a layer that rotates."""
        return self._tables[self._index(layer)]

    def rows(self, layer: int) -> ir.Value:
        """Return the rows [B, S] of its tables that the step's tokens read."""
        return self._rows[self._index(layer)]

    def half(self, layer: int) -> int:
        """Return half the number of dimensions that a layer rotates."""
        return len(self._spec.rotations[self._index(layer)].frequencies)

    def _index(self, layer: int) -> int:
        index = self._spec.rotary[layer]
        assert index is not None, f"layer {layer} has no rotary positions"
        return index

    def _is_long(self, rotary: Rotary) -> bool:
        return 0 < rotary.short_positions < self._max_positions

    def _angles(self, rotary: Rotary) -> torch.Tensor:
        positions = torch.arange(self._max_positions, dtype=torch.float)[:, None]
        angles = positions * torch.tensor(rotary.frequencies)
        if not self._is_long(rotary):
            return angles
        return torch.cat([angles[: rotary.short_positions], positions * torch.tensor(rotary.long_frequencies)])

    def _long_rows(self, rotary: Rotary, positions: ir.Value, name: str) -> ir.Value:
        """Return the positions, moved past the rows for short sequences where a sequence is longer than these."""
        graph = self._graph
        short = graph.ints(rotary.short_positions)
        last = graph.op("ReduceMax", [positions, graph.ints(1)], f"{name}.last", keepdims=1)  # [B, 1]
        is_long = graph.op("GreaterOrEqual", [last, short], f"{name}.is_long")
        number = graph.op("Cast", [is_long], f"{name}.long", to=ir.DataType.INT64)
        moved = graph.op("Mul", [number, short], f"{name}.moved")
        return graph.op("Add", [positions, moved], f"{name}.rows")
