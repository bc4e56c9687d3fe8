"""Attention in the engine form: rotary embedding, masks and caches as basic operators in shapes that TensorRT fuses."""

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from coatrt.export.graph import GraphBuilder
from coatrt.models.spec import DecoderSpec

__all__ = ["Attend", "EngineAttention"]

Attend = Callable[[ir.Value, ir.Value, ir.Value, int, str], tuple[ir.Value, list[ir.Value]]]
"""(query, key, value, layer, prefix of names) → attention output, and the updated caches."""


class EngineAttention:
    """The attention of every layer; nodes that layers share are written once.

    Args:
        graph: receives the nodes.
        spec: the decoder's architecture.
        positions: [B, S].
        write_index: [B], the first cache slot to write.
        tables: cosines and sines [positions, rotated dimensions / 2].
        past: key and value cache of each layer.
    """

    def __init__(
        self,
        graph: GraphBuilder,
        spec: DecoderSpec,
        positions: ir.Value,
        write_index: ir.Value,
        tables: tuple[ir.Value, ir.Value],
        past: Sequence[tuple[ir.Value, ir.Value]],
    ) -> None:
        self._graph, self._spec, self._positions, self._write_index = graph, spec, positions, write_index
        (self._cos, self._sin), self._past = tables, past
        # TensorRT-RTX 1.7.1 copies the whole key and value cache once per query head for every token, unless the
        # queries of a group are laid out as rows of one head.
        self._grouped = spec.heads != spec.kv_heads
        if any(spec.rotary):
            self._cos_factors, self._sin_factors = self._rotary_factors()
        self._masks = self._attention_masks()

    def _rotary_factors(self) -> tuple[ir.Value, ir.Value]:
        """Return cos|cos and −sin|sin of the step's positions, [B, 1, S, rotated dimensions], for all layers."""
        graph = self._graph
        positions = graph.op("Unsqueeze", [self._positions, graph.ints(1)], "rotary.positions")  # [B, 1, S]
        cos = graph.op("Gather", [self._cos, positions], "rotary.cos_here", axis=0)
        sin = graph.op("Gather", [self._sin, positions], "rotary.sin_here", axis=0)
        negated = graph.op("Neg", [sin], "rotary.sin_negated")
        return (
            graph.op("Concat", [cos, cos], "rotary.cos_twice", axis=-1),
            graph.op("Concat", [negated, sin], "rotary.sin_twice", axis=-1),
        )

    def _attention_masks(self) -> dict[int | None, ir.Value]:
        """Return the mask [B, 1, S, L] of each window: a query at position p sees slots p − window + 1 … p.

        For grouped queries it is repeated for each query head of a group: [B, 1, group · S, L].
        """
        graph, length = self._graph, self._graph.form.cache_length
        assert length is not None, "the engine form has a cache length"
        slots = graph.constant(np.arange(length, dtype=np.int64))
        positions = self._positions
        if self._grouped:
            repeats = graph.ints(1, self._spec.heads // self._spec.kv_heads)
            positions = graph.op("Tile", [positions, repeats], "mask.positions")  # [B, group · S]
        query = graph.op("Unsqueeze", [positions, graph.ints(1, 3)], "mask.query")  # [B, 1, S, 1]
        causal = graph.op("LessOrEqual", [slots, query], "mask.causal")
        masks: dict[int | None, ir.Value] = {None: causal}
        for window in sorted({window for window in self._spec.windows if window is not None}):
            first = graph.op("Sub", [query, graph.ints(window)], f"mask.before{window}")
            near = graph.op("Greater", [slots, first], f"mask.near{window}")
            masks[window] = graph.op("And", [causal, near], f"mask.window{window}")
        return masks

    def attend(
        self, query: ir.Value, key: ir.Value, value: ir.Value, layer: int, prefix: str
    ) -> tuple[ir.Value, list[ir.Value]]:
        """Return the attention output, [B, S, heads · D], and the caches with the new keys and values.

        Args:
            query: [B, heads, S, D].
            key: [B, KV, S, D].
            value: [B, KV, S, D].
            layer: index of the layer.
            prefix: prefix of the node names.
        """
        graph, spec = self._graph, self._spec
        if spec.rotary[layer]:
            query, key = self._rotate(query, f"{prefix}.q"), self._rotate(key, f"{prefix}.k")
        past_key, past_value = self._past[layer]
        key = graph.op("TensorScatter", [past_key, key, self._write_index], f"present.{layer}.key", axis=2)
        value = graph.op("TensorScatter", [past_value, value, self._write_index], f"present.{layer}.value", axis=2)
        mask = self._masks[spec.windows[layer]]
        if self._grouped:  # lay out the queries of a group as if they were further positions
            query = graph.op("Reshape", [query, graph.ints(0, spec.kv_heads, -1, spec.head_dim)], f"{prefix}.q.grouped")
        mixed = graph.op(
            "Attention", [query, key, value, mask], f"{prefix}.attention", scale=spec.attention_multiplier
        )  # [B, heads, S, D]
        if self._grouped:
            mixed = graph.op("Reshape", [mixed, graph.ints(0, spec.heads, -1, spec.head_dim)], f"{prefix}.ungrouped")
        mixed = graph.op("Transpose", [mixed], f"{prefix}.by_position", perm=[0, 2, 1, 3])
        mixed = graph.op("Reshape", [mixed, graph.ints(0, 0, spec.heads * spec.head_dim)], f"{prefix}.joined")
        return mixed, [key, value]

    def _rotate(self, x: ir.Value, name: str) -> ir.Value:
        """Return x [B, heads, S, D] with rotary embedding, written as basic operators.

        For the operator RotaryEmbedding, TensorRT-RTX 1.7.1 stores a copy of its kernel's source per layer, 165 kB
        each; for these operators it stores one copy.
        """
        graph, half, width = self._graph, len(self._spec.inverse_frequencies), self._spec.head_dim

        def part(label: str, start: int, end: int) -> ir.Value:
            return graph.op("Slice", [x, graph.ints(start), graph.ints(end), graph.ints(-1)], f"{name}.{label}")

        first, second = part("first", 0, half), part("second", half, 2 * half)
        rest = part("rest", 2 * half, width) if 2 * half < width else None
        both = x if rest is None else graph.op("Concat", [first, second], f"{name}.turned", axis=-1)
        swapped = graph.op("Concat", [second, first], f"{name}.swapped", axis=-1)
        along = graph.op("Mul", [both, self._cos_factors], f"{name}.along")
        across = graph.op("Mul", [swapped, self._sin_factors], f"{name}.across")
        if rest is None:
            return graph.op("Add", [along, across], f"{name}.rotated")
        rotated = graph.op("Add", [along, across], f"{name}.turned_by_position")
        return graph.op("Concat", [rotated, rest], f"{name}.rotated", axis=-1)
