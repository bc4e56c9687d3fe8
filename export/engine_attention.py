"""Attention in the engine form: rotary embedding, masks and caches as basic operators in shapes that TensorRT fuses."""

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from coatrt.export.graph import GraphBuilder
from coatrt.export.rotary_tables import RotaryTables
from coatrt.models.spec import DecoderSpec

__all__ = ["Attend", "EngineAttention"]

_MASKED = 6e4  # far below any score, within float16
Attend = Callable[[ir.Value, ir.Value, ir.Value, int, str], tuple[ir.Value, list[ir.Value]]]
"""(query, key, value, layer, prefix of names) → attention output, and the updated caches."""


class EngineAttention:
    """The attention of every layer; nodes that layers share are written once.

    Args:
        graph: receives the nodes.
        spec: the decoder's architecture.
        positions: [B, S].
        write_index: [B], the first cache slot to write.
        rotary: the rotary tables.
        past: key and value cache of each layer.
        last_norm: norm of the rotated queries (0) or keys (1): (x, prefix, which) → x; None if there is none.
    """

    def __init__(
        self,
        graph: GraphBuilder,
        spec: DecoderSpec,
        positions: ir.Value,
        write_index: ir.Value,
        rotary: RotaryTables,
        past: Sequence[tuple[ir.Value, ir.Value]],
        last_norm: Callable[[ir.Value, str, int], ir.Value] | None = None,
    ) -> None:
        self._graph, self._spec, self._positions, self._write_index = graph, spec, positions, write_index
        self._rotary, self._past, self._last_norm = rotary, past, last_norm
        # TensorRT-RTX 1.7.1 copies the whole key and value cache once per query head for every token, unless the
        # queries of a group are laid out as rows of one head.
        self._grouped = spec.heads != spec.kv_heads
        self._factors: dict[int, tuple[ir.Value, ir.Value]] = {}
        for index in sorted({index for index in spec.rotary if index is not None}):
            self._factors[index] = self._rotary_factors(spec.rotary.index(index), f"rotary.{index}.here")
        self._masks = self._attention_masks()

    def _rotary_factors(self, layer: int, name: str) -> tuple[ir.Value, ir.Value]:
        """Return cos|cos and −sin|sin of the step's positions, [B, 1, S, rotated dimensions], for all like layers."""
        graph, tables = self._graph, self._rotary.tables(layer)
        rows = graph.op("Unsqueeze", [self._rotary.rows(layer), graph.ints(1)], f"{name}.rows")  # [B, 1, S]
        cos, sin = (
            graph.op("Gather", [table, rows], f"{name}.{part}", axis=0)
            for part, table in zip(("cos", "sin"), tables, strict=True)
        )
        negated = graph.op("Neg", [sin], f"{name}.sin_negated")
        return (
            graph.op("Concat", [cos, cos], f"{name}.cos_twice", axis=-1),
            graph.op("Concat", [negated, sin], f"{name}.sin_twice", axis=-1),
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
        if spec.rotary[layer] is not None:
            query, key = self._rotate(query, f"{prefix}.q", layer), self._rotate(key, f"{prefix}.k", layer)
        if self._last_norm is not None:
            query, key = self._last_norm(query, prefix, 0), self._last_norm(key, prefix, 1)
        past_key, past_value = self._past[layer]
        key = graph.op("TensorScatter", [past_key, key, self._write_index], f"present.{layer}.key", axis=2)
        value = graph.op("TensorScatter", [past_value, value, self._write_index], f"present.{layer}.value", axis=2)
        mask = self._masks[spec.windows[layer]]
        if self._grouped:  # lay out the queries of a group as if they were further positions
            query = graph.op("Reshape", [query, graph.ints(0, spec.kv_heads, -1, spec.head_dim)], f"{prefix}.q.grouped")
        if spec.attention_cap or spec.kv_heads == 1:
            mixed = self._plain_attention(query, key, value, mask, f"{prefix}.attention")
        else:
            mixed = graph.op(
                "Attention", [query, key, value, mask], f"{prefix}.attention", scale=spec.attention_multiplier
            )  # [B, heads, S, D]
        if self._grouped:
            mixed = graph.op("Reshape", [mixed, graph.ints(0, spec.heads, -1, spec.head_dim)], f"{prefix}.ungrouped")
        mixed = graph.op("Transpose", [mixed], f"{prefix}.by_position", perm=[0, 2, 1, 3])
        mixed = graph.op("Reshape", [mixed, graph.ints(0, 0, spec.heads * spec.head_dim)], f"{prefix}.joined")
        return mixed, [key, value]

    def _plain_attention(self, query: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value, name: str) -> ir.Value:
        """Return attention in basic operators, for what TensorRT-RTX 1.7.1 does not build with the operator Attention.

        That is a soft cap c, and a single key-value head. The scale, with a cap divided by c, comes
        before the product, so that float16 does not overflow.
        """
        graph, cap = self._graph, self._spec.attention_cap
        scale = self._spec.attention_multiplier / (cap or 1.0)
        query = graph.op("Mul", [query, graph.real(scale)], f"{name}.scaled")
        turned = graph.op("Transpose", [key], f"{name}.keys", perm=[0, 1, 3, 2])
        scores = graph.op("MatMul", [query, turned], f"{name}.scores")
        if cap:
            scores = graph.op("Mul", [graph.op("Tanh", [scores], f"{name}.bounded"), graph.real(cap)], f"{name}.capped")
        scores = graph.op("Where", [mask, scores, graph.real(-_MASKED)], f"{name}.masked")
        weights = graph.op("Softmax", [scores], f"{name}.weights", axis=-1)
        return graph.op("MatMul", [weights, value], name)

    def _rotate(self, x: ir.Value, name: str, layer: int) -> ir.Value:
        """Return x [B, heads, S, D] with rotary embedding, written as basic operators.

        For the operator RotaryEmbedding, TensorRT-RTX 1.7.1 stores a copy of its kernel's source per layer, 165 kB
        each; for these operators it stores one copy. Where neighbouring dimensions are paired, the first of each pair
        go before the second ones, in queries and keys alike, which does not change their product.
        """
        graph, half, width = self._graph, self._rotary.half(layer), self._spec.head_dim
        interleaved, factors = self._spec.interleaved, self._factors[self._spec.rotary[layer] or 0]

        def part(label: str, start: int, end: int, step: int = 1) -> ir.Value:
            bounds = [graph.ints(start), graph.ints(end), graph.ints(-1), *([graph.ints(step)] if step > 1 else [])]
            return graph.op("Slice", [x, *bounds], f"{name}.{label}")

        if interleaved:
            first, second = part("first", 0, 2 * half, 2), part("second", 1, 2 * half, 2)
        else:
            first, second = part("first", 0, half), part("second", half, 2 * half)
        rest = part("rest", 2 * half, width) if 2 * half < width else None
        is_whole = rest is None and not interleaved
        both = x if is_whole else graph.op("Concat", [first, second], f"{name}.turned", axis=-1)
        swapped = graph.op("Concat", [second, first], f"{name}.swapped", axis=-1)
        along = graph.op("Mul", [both, factors[0]], f"{name}.along")
        across = graph.op("Mul", [swapped, factors[1]], f"{name}.across")
        if rest is None:
            return graph.op("Add", [along, across], f"{name}.rotated")
        rotated = graph.op("Add", [along, across], f"{name}.turned_by_position")
        return graph.op("Concat", [rotated, rest], f"{name}.rotated", axis=-1)
