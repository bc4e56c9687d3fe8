"""The decoder network as graph nodes: embedding, layers with caches, logits."""

from collections.abc import Callable

import onnx_ir as ir
import torch

from coatrt.configs.lora_contract import LoraContract
from coatrt.export.engine_attention import Attend, EngineAttention
from coatrt.export.graph import GraphBuilder
from coatrt.export.projections import NetworkWeights, Projections
from coatrt.models.matrices import HEAD
from coatrt.models.spec import DecoderSpec

__all__ = ["Network"]


class Network:
    """Writes one decoder into one graph.

    Args:
        graph: receives the nodes; its weights are stored already.
        spec: the decoder's architecture.
        weights: the weights in the graph.
        tensor: reads a norm or bias of the checkpoint by name; returns None if there is none of that name.
        contract: LoRA inputs to add; None for a graph without LoRA.
        max_positions: rows of the rotary tables.
    """

    def __init__(
        self,
        graph: GraphBuilder,
        spec: DecoderSpec,
        weights: NetworkWeights,
        tensor: Callable[[str], torch.Tensor | None],
        contract: LoraContract | None,
        max_positions: int,
    ) -> None:
        self._graph, self._spec, self._weights = graph, spec, weights
        self._tensor, self._max_positions = tensor, max_positions
        self._projections = Projections(graph, weights, tensor, contract)
        rotated = 2 * len(spec.inverse_frequencies)
        # GroupQueryAttention can rotate if both widths are multiples of 16; it then derives positions from `seqlens_k`.
        self._rotates_inside = not graph.is_engine and rotated % 16 == 0 and spec.head_dim % 16 == 0

    def write(self) -> None:
        """Add inputs, nodes and outputs."""
        graph, spec = self._graph, self._spec
        integer = ir.DataType.INT64
        ids = graph.input("input_ids", integer, ["B", "S"])
        if not graph.is_cuda or (any(spec.rotary) and not self._rotates_inside):
            self._positions = graph.input("position_ids", integer, ["B", "S"])
        if graph.is_cuda:
            self._ends = (
                graph.input("seqlens_k", ir.DataType.INT32, ["B"]),
                graph.input("total_sequence_length", ir.DataType.INT32, []),
            )
        else:
            self._write_index = graph.input("write_index", integer, ["B"])
        index = graph.input("logits_rows" if graph.is_cuda else "logits_index", integer, ["B", "T"])
        slots = graph.form.cache_length if graph.form.cache_length is not None else "L"
        shape = ("B", spec.kv_heads, slots, spec.head_dim)
        self._past = [
            (
                graph.input(f"past_key_values.{layer}.key", graph.activations, shape),
                graph.input(f"past_key_values.{layer}.value", graph.activations, shape),
            )
            for layer in range(spec.layers)
        ]
        self._projections.add_inputs(ids)
        self._cos, self._sin = self._rotary_tables()
        self._attend: Attend = self._cpu_attention
        if graph.is_engine:
            tables = self._cos, self._sin
            self._attend = EngineAttention(graph, spec, self._positions, self._write_index, tables, self._past).attend
        elif not graph.is_cuda:
            self._ends = self._sequence_ends(ids)

        x = self._multiply(self._weights.table.rows(ids), spec.embedding_multiplier, "embedding.multiplied")
        # x: [B, S, H]
        hidden, presents = x if spec.norm_after else self._norm(x, "model.layers.0.input_layernorm"), []
        for layer in range(spec.layers):
            x, hidden, present = self._layer(x, hidden, layer)
            presents += present
        x = self._logits_positions(hidden, index)  # the head runs at these positions only
        if self._last_norm is None:
            x = self._norm(x, "model.norm")
        has_divisor = spec.logits_divisor != 1.0
        last = "logits.narrow" if graph.is_cuda else "logits"
        logits = graph.op("MatMul", [x, self._weights.single[HEAD]], "logits.undivided" if has_divisor else last)
        if has_divisor:
            logits = graph.op("Div", [logits, graph.real(spec.logits_divisor)], last)
        dtype = graph.activations
        if graph.is_cuda:  # the GPU casts the logits in microseconds, numpy in half a millisecond
            dtype = ir.DataType.FLOAT
            logits = graph.op("Cast", [logits], "logits", to=dtype)
        graph.output(logits, dtype, ["B", "T", spec.vocabulary])
        for value in presents:
            graph.output(value, graph.activations, shape)

    def _rotary_tables(self) -> tuple[ir.Value, ir.Value]:
        """Return cosines and sines [positions, rotated dimensions / 2], computed in float32 as in transformers."""
        angles = torch.arange(self._max_positions, dtype=torch.float)[:, None] * torch.tensor(
            self._spec.inverse_frequencies
        )
        scaling = self._spec.rope_scaling
        return self._graph.small("rotary.cos", angles.cos() * scaling), self._graph.small(
            "rotary.sin", angles.sin() * scaling
        )

    def _sequence_ends(self, ids: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return the last slot each sequence fills in this call, int32 [B], and the longest sequence's new length."""
        graph = self._graph
        count = graph.op("Shape", [ids], "tokens.added", start=1, end=2)
        ends = graph.op("Add", [self._write_index, count], "cache.ends")
        last = graph.op("Sub", [ends, graph.ints(1)], "cache.last.wide")
        longest = graph.op("ReduceMax", [ends], "cache.filled.wide", keepdims=0)
        return (
            graph.op("Cast", [last], "cache.last", to=ir.DataType.INT32),
            graph.op("Cast", [longest], "cache.filled", to=ir.DataType.INT32),
        )

    @property
    def _last_norm(self) -> str | None:
        """The final norm if it is fused with the last addition; None if it runs after it, at the logits' positions."""
        return None if self._graph.is_engine or self._spec.norm_after else "model.norm"

    def _logits_positions(self, hidden: ir.Value, index: ir.Value) -> ir.Value:
        """Return the hidden states of the positions that get logits, [B, T, H].

        In the cuda form `index` counts through all B·S positions, for a Gather: a captured GatherND would copy from
        host memory that ONNX Runtime has freed by the time of the replay.
        """
        graph = self._graph
        if graph.is_cuda:
            return graph.op(
                "Gather", [graph.op("Flatten", [hidden], "all_hidden", axis=2), index], "last_hidden", axis=0
            )
        positions = graph.op("Unsqueeze", [index, graph.ints(-1)], "logits_positions")  # [B, T, 1]
        return graph.op("GatherND", [hidden, positions], "last_hidden", batch_dims=1)

    def _layer(self, x: ir.Value, hidden: ir.Value, layer: int) -> tuple[ir.Value, ir.Value, list[ir.Value]]:
        """Return the residual stream after a layer, the input of the next layer, and the caches.

        Args:
            x: the residual stream.
            hidden: the layer's input: the norm of x, or x itself in families that norm after each block.
            layer: index of the layer.
        """
        prefix, norm_after = f"model.layers.{layer}", self._spec.norm_after
        update, presents = self._attention(hidden, layer, f"{prefix}.self_attn")
        middle: str | None = f"{prefix}.post_attention_layernorm"
        next_norm = f"model.layers.{layer + 1}.input_layernorm" if layer + 1 < self._spec.layers else self._last_norm
        if norm_after:
            update, middle, next_norm = self._norm(update, f"{prefix}.post_attention_layernorm"), None, None
        x, hidden = self._add_residual(x, update, f"{prefix}.attention_residual", middle)
        update = self._mlp(hidden, f"{prefix}.mlp")
        if norm_after:
            update = self._norm(update, f"{prefix}.post_feedforward_layernorm")
        x, hidden = self._add_residual(x, update, f"{prefix}.mlp_residual", next_norm)
        return x, hidden, presents

    def _attention(self, x: ir.Value, layer: int, prefix: str) -> tuple[ir.Value, list[ir.Value]]:
        spec, names = self._spec, [f"{prefix}.{name}_proj" for name in "qkv"]
        qkv = self._projections.fused(x, names)
        if qkv is not None and self._takes_packed(layer, prefix):
            heads, presents = self._cpu_attention(qkv, None, None, layer, prefix)
            return self._projections.linear(heads, f"{prefix}.o_proj"), presents
        query, key, value = self._projections.parts(x, qkv, names)
        query = self._heads(query, f"{prefix}.q_proj", f"{prefix}.q_norm", spec.heads)
        key = self._heads(key, f"{prefix}.k_proj", f"{prefix}.k_norm", spec.kv_heads)
        value = self._heads(value, f"{prefix}.v_proj", None, spec.kv_heads)
        heads, presents = self._attend(query, key, value, layer, prefix)
        return self._projections.linear(heads, f"{prefix}.o_proj"), presents

    def _takes_packed(self, layer: int, prefix: str) -> bool:
        """Return whether the attention can read the fused q|k|v projection: no norm or rotation comes in between."""
        if self._graph.is_engine:
            return False
        has_norm = any(self._tensor(f"{prefix}.{name}_norm.weight") is not None for name in "qk")
        return not has_norm and (self._rotates_inside or not self._spec.rotary[layer])

    def _cpu_attention(
        self, query: ir.Value, key: ir.Value | None, value: ir.Value | None, layer: int, prefix: str
    ) -> tuple[ir.Value, list[ir.Value]]:
        """Write GroupQueryAttention, which appends to the caches and reads only their filled slots.

        Without key and value, `query` is q|k|v. ONNX's own Attention and TensorScatter would read every slot for every
        token.
        """
        graph, spec, window = self._graph, self._spec, self._spec.windows[layer]
        inside = self._rotates_inside and spec.rotary[layer]
        if spec.rotary[layer] and not inside:
            assert key is not None, "a fused projection is rotated inside the operator"
            query = self._rotate(query, f"{prefix}.q", spec.heads)
            key = self._rotate(key, f"{prefix}.k", spec.kv_heads)
        attributes = {"do_rotary": 1} if inside else {}
        if window is not None:
            attributes["local_window_size"] = window
        tables: tuple[ir.Value, ...] = (self._cos, self._sin) if inside else ()
        if inside and not graph.is_cuda:
            tables = (*tables, self._positions)
        heads, *presents = graph.runtime_op(
            "GroupQueryAttention",
            [query, key, value, *self._past[layer], *self._ends, *tables],
            [f"{prefix}.attention", f"present.{layer}.key", f"present.{layer}.value"],
            num_heads=spec.heads,
            kv_num_heads=spec.kv_heads,
            scale=spec.attention_multiplier,
            **attributes,
        )
        return heads, presents

    def _heads(self, out: ir.Value, projection: str, norm: str | None, heads: int) -> ir.Value:
        """Return a projection's output, with its norm if the checkpoint has one.

        The shape is [B, heads, S, D] in the engine form, [B, S, heads · D] in the others.
        """
        graph, width = self._graph, self._spec.head_dim
        scale = self._tensor(f"{norm}.weight") if norm is not None else None
        per_head = scale is not None and scale.numel() == width
        if scale is not None and not per_head:  # one norm over all heads
            out = self._norm(out, str(norm))
        if not (graph.is_engine or per_head):
            return out
        out = graph.op("Reshape", [out, graph.ints(0, 0, heads, width)], f"{projection}.heads")
        if per_head:
            out = self._norm(out, str(norm))
        if not graph.is_engine:
            return graph.op("Reshape", [out, graph.ints(0, 0, heads * width)], f"{projection}.normed")
        return graph.op("Transpose", [out], f"{projection}.by_head", perm=[0, 2, 1, 3])

    def _rotate(self, x: ir.Value, name: str, heads: int) -> ir.Value:
        half, width = len(self._spec.inverse_frequencies), self._spec.head_dim
        partial = {"rotary_embedding_dim": 2 * half} if 2 * half != width else {}
        inputs = [x, self._cos, self._sin, self._positions]
        return self._graph.op("RotaryEmbedding", inputs, f"{name}.rotated", **partial, num_heads=heads)

    def _mlp(self, x: ir.Value, prefix: str) -> ir.Value:
        graph, names = self._graph, [f"{prefix}.{name}_proj" for name in ("gate", "up")]
        gate, up = self._projections.parts(x, self._projections.fused(x, names), names)
        if self._spec.activation == "silu" and graph.is_engine:
            gate = graph.op("Swish", [gate], f"{prefix}.activated")
        elif self._spec.activation == "silu":  # one kernel; ONNX Runtime expands Swish into three
            (gate,) = graph.runtime_op("QuickGelu", [gate], [f"{prefix}.activated"], alpha=1.0)
        else:
            approximate = "tanh" if self._spec.activation == "gelu_tanh" else "none"
            gate = graph.op("Gelu", [gate], f"{prefix}.activated", approximate=approximate)
        product = graph.op("Mul", [gate, up], f"{prefix}.gated")
        return self._projections.linear(product, f"{prefix}.down_proj")

    def _norm(self, x: ir.Value, name: str) -> ir.Value:
        op = "LayerNormalization" if self._spec.layer_norm else "RMSNormalization"
        return self._graph.op(op, [x, *self._scales(name)], name, axis=-1, epsilon=self._spec.epsilon)

    def _scales(self, name: str) -> list[ir.Value]:
        """Return the weight of a norm and its bias, if it has one."""
        weight, bias = self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias") if self._spec.layer_norm else None
        assert weight is not None, f"check_tensors refuses a checkpoint without {name}.weight"
        scales = [self._graph.small(f"{name}.weight", weight.float() + self._spec.norm_offset)]
        return scales if bias is None else [*scales, self._graph.small(f"{name}.bias", bias)]

    def _multiply(self, x: ir.Value, factor: float, name: str) -> ir.Value:
        return x if factor == 1.0 else self._graph.op("Mul", [x, self._graph.real(factor)], name)

    def _add_residual(self, x: ir.Value, update: ir.Value, name: str, norm: str | None) -> tuple[ir.Value, ir.Value]:
        """Return x + update and the norm of that sum; without a norm, the sum twice."""
        graph, spec = self._graph, self._spec
        update = self._multiply(update, spec.residual_multiplier, f"{name}.multiplied")
        if norm is None or graph.is_engine:
            total = graph.op("Add", [x, update], name)
            return total, total if norm is None else self._norm(total, norm)
        op = "SkipLayerNormalization" if spec.layer_norm else "SkipSimplifiedLayerNormalization"
        inputs = [x, update, *self._scales(norm)]
        hidden, *_, total = graph.runtime_op(op, inputs, [norm, "", "", name], epsilon=spec.epsilon)
        return total, hidden
