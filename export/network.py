"""The decoder network as graph nodes: embedding, layers with caches, logits."""

from collections.abc import Callable

import onnx_ir as ir
import torch

from coatrt.configs.lora_contract import LoraContract
from coatrt.export.activation import activated
from coatrt.export.engine_attention import Attend, EngineAttention
from coatrt.export.graph import GraphBuilder
from coatrt.export.projections import NetworkWeights, Projections
from coatrt.export.rotary_tables import RotaryTables
from coatrt.models.families import FAMILIES
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
        self._tensor = tensor
        self._projections = Projections(graph, weights, tensor, contract, spec.parallel)
        self._family = FAMILIES[spec.family]
        self._rotary = RotaryTables(graph, spec, max_positions)

    def write(self) -> None:
        """Add inputs, nodes and outputs."""
        graph, spec = self._graph, self._spec
        integer = ir.DataType.INT64
        ids = graph.input("input_ids", integer, ["B", "S"])
        positions = None
        if not graph.is_cuda or self._rotary.needs_positions:
            positions = graph.input("position_ids", integer, ["B", "S"])
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
        self._rotary.write(positions)
        self._attend: Attend = self._cpu_attention
        if graph.is_engine:
            assert positions is not None, "the engine form has positions"
            last = self._last_head_norm if self._family.head_norms_last else None
            engine = EngineAttention(graph, spec, positions, self._write_index, self._rotary, self._past, last)
            self._attend = engine.attend
        elif not graph.is_cuda:
            self._ends = self._sequence_ends(ids)

        x = self._multiply(self._weights.table.rows(ids), spec.embedding_multiplier, "embedding.multiplied")
        # x: [B, S, H]
        first, presents = self._norm_name(0, 0), []
        hidden = x if first is None else self._norm(x, first)
        for layer in range(spec.layers):
            x, hidden, present = self._layer(x, hidden, layer)
            presents += present
        x = self._logits_positions(hidden, index)  # the head runs at these positions only
        if self._fused_last_norm is None:
            x = self._norm(x, self._family.last_norm)
        logits = self._logits(x, "logits.narrow" if graph.is_cuda else "logits")
        dtype = graph.activations
        if graph.is_cuda:  # the GPU casts the logits in microseconds, numpy in half a millisecond
            dtype = ir.DataType.FLOAT
            logits = graph.op("Cast", [logits], "logits", to=dtype)
        graph.output(logits, dtype, ["B", "T", spec.vocabulary])
        for value in presents:
            graph.output(value, graph.activations, shape)

    def _logits(self, x: ir.Value, name: str) -> ir.Value:
        """Return the logits [B, T, V]: the head's product, its bias, divisor and soft cap."""
        graph, spec, bias = self._graph, self._spec, self._tensor(f"{HEAD}.bias")
        steps: list[tuple[str, ir.Value | None]] = [("MatMul", self._weights.single[HEAD])]
        if bias is not None:
            steps.append(("Add", graph.small(f"{HEAD}.bias", bias)))
        if spec.logits_divisor != 1.0:
            steps.append(("Div", graph.real(spec.logits_divisor)))
        if spec.logits_cap:
            cap = graph.real(spec.logits_cap)
            steps += [("Div", cap), ("Tanh", None), ("Mul", cap)]
        for number, (op, other) in enumerate(steps, 1):
            inputs = [x] if other is None else [x, other]
            x = graph.op(op, inputs, name if number == len(steps) else f"logits.{number}")
        return x

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

    def _norm_name(self, layer: int, place: int) -> str | None:
        """Return the name of a layer's norm at a place of `Family.norms`; None if the checkpoint has none there."""
        name = f"model.layers.{layer}.{self._family.norms[place]}"
        has_norm = self._family.norms[place] and self._tensor(f"{name}.weight") is not None
        return name if has_norm else None

    @property
    def _fused_last_norm(self) -> str | None:
        """The final norm if it is fused with the last addition; None if it runs after it, at the logits' positions."""
        is_fused = not self._graph.is_engine and self._family.norms[0]
        return self._family.last_norm if is_fused else None

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
            hidden: the layer's input: the norm of x, or x itself in families without a norm there.
            layer: index of the layer.
        """
        prefix, is_last = f"model.layers.{layer}", layer + 1 == self._spec.layers
        next_norm = self._fused_last_norm if is_last else self._norm_name(layer + 1, 0)
        update, presents = self._attention(hidden, layer, f"{prefix}.self_attn")
        if self._spec.parallel:
            both = [update, self._mlp(hidden, f"{prefix}.mlp")]
            update = self._graph.op("Add", both, f"{prefix}.attention_and_mlp")
        else:
            update = self._maybe_norm(update, self._norm_name(layer, 1))
            x, hidden = self._add_residual(x, update, f"{prefix}.attention_residual", self._norm_name(layer, 2))
            update = self._maybe_norm(self._mlp(hidden, f"{prefix}.mlp"), self._norm_name(layer, 3))
        x, hidden = self._add_residual(x, update, f"{prefix}.mlp_residual", next_norm)
        return x, hidden, presents

    def _module(self, prefix: str, name: str) -> str:
        return f"{prefix}.{self._family.modules.get(name, name)}"

    def _attention(self, x: ir.Value, layer: int, prefix: str) -> tuple[ir.Value, list[ir.Value]]:
        spec, names = self._spec, [f"{prefix}.{name}_proj" for name in "qkv"]
        shares, output = (spec.heads, spec.kv_heads, spec.kv_heads), self._module(prefix, "o_proj")
        if self._takes_packed(layer, prefix):
            qkv = self._projections.fused(x, names)
            if qkv is not None:
                heads, presents = self._cpu_attention(qkv, None, None, layer, prefix)
                return self._projections.linear(heads, output), presents
        query, key, value = self._projections.parts(x, names, shares)
        norms = [None, None] if self._family.head_norms_last else [f"{prefix}.{n}" for n in self._family.head_norms]
        query = self._heads(query, f"{prefix}.q_proj", norms[0], spec.heads)
        key = self._heads(key, f"{prefix}.k_proj", norms[1], spec.kv_heads)
        value = self._heads(value, f"{prefix}.v_proj", None, spec.kv_heads)
        heads, presents = self._attend(query, key, value, layer, prefix)
        return self._projections.linear(heads, output), presents

    def _takes_packed(self, layer: int, prefix: str) -> bool:
        """Return whether the attention can read the fused q|k|v projection: no norm or rotation comes in between."""
        if self._graph.is_engine:
            return False
        has_norm = any(self._tensor(f"{prefix}.{name}.weight") is not None for name in self._family.head_norms)
        return not has_norm and (self._spec.rotary[layer] is None or self._rotary.inside(layer))

    def _cpu_attention(
        self, query: ir.Value, key: ir.Value | None, value: ir.Value | None, layer: int, prefix: str
    ) -> tuple[ir.Value, list[ir.Value]]:
        """Write GroupQueryAttention, which appends to the caches and reads only their filled slots.

        Without key and value, `query` is q|k|v. ONNX's own Attention and TensorScatter would read every slot for every
        token.
        """
        graph, spec, window = self._graph, self._spec, self._spec.windows[layer]
        inside = self._rotary.inside(layer)
        if spec.rotary[layer] is not None and not inside:
            assert key is not None, "a fused projection is rotated inside the operator"
            query = self._rotate(query, f"{prefix}.q", spec.heads, layer)
            key = self._rotate(key, f"{prefix}.k", spec.kv_heads, layer)
        if self._family.head_norms_last:
            assert key is not None, "a fused projection has no norm"
            query, key = self._last_head_norm(query, prefix, 0), self._last_head_norm(key, prefix, 1)
        attributes: dict[str, float | int] = {"do_rotary": 1} if inside else {}
        if inside and spec.interleaved:
            attributes["rotary_interleaved"] = 1
        if window is not None:
            attributes["local_window_size"] = window
        if spec.attention_cap:
            attributes["softcap"] = spec.attention_cap
        tables: tuple[ir.Value, ...] = self._rotary.tables(layer) if inside else ()
        if inside and not graph.is_cuda:
            tables = (*tables, self._rotary.rows(layer))
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
        per_head = scale is not None and (scale.ndim == 2 or scale.numel() == width)
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

    def _last_head_norm(self, x: ir.Value, prefix: str, which: int) -> ir.Value:
        """Return rotated queries (0) or keys (1), normed; a norm over single heads, in the shape of `_heads`."""
        graph, width, norm = self._graph, self._spec.head_dim, f"{prefix}.{self._family.head_norms[which]}"
        if graph.is_engine:
            return self._norm(x, norm)
        x = self._norm(graph.op("Reshape", [x, graph.ints(0, 0, -1, width)], f"{norm}.heads"), norm)
        return graph.op("Reshape", [x, graph.ints(0, 0, width * self._heads_of(which))], f"{norm}.joined")

    def _heads_of(self, which: int) -> int:
        return (self._spec.heads, self._spec.kv_heads)[which]

    def _rotate(self, x: ir.Value, name: str, heads: int, layer: int) -> ir.Value:
        rotated = 2 * self._rotary.half(layer)
        attributes = {"rotary_embedding_dim": rotated} if rotated != self._spec.head_dim else {}
        if self._spec.interleaved:
            attributes["interleaved"] = 1
        inputs = [x, *self._rotary.tables(layer), self._rotary.rows(layer)]
        return self._graph.op("RotaryEmbedding", inputs, f"{name}.rotated", **attributes, num_heads=heads)

    def _mlp(self, x: ir.Value, prefix: str) -> ir.Value:
        up, down = self._module(prefix, "up_proj"), self._module(prefix, "down_proj")
        if not self._spec.gated:
            inner = self._activated(self._projections.linear(x, up), prefix)
        else:
            gate, other = self._projections.parts(x, [f"{prefix}.gate_proj", up], (1, 1))
            inner = self._graph.op("Mul", [self._activated(gate, prefix), other], f"{prefix}.gated")
        return self._projections.linear(inner, down)

    def _activated(self, x: ir.Value, prefix: str) -> ir.Value:
        return activated(self._graph, self._spec, x, prefix, self._tensor)

    def _norm(self, x: ir.Value, name: str) -> ir.Value:
        op = "LayerNormalization" if self._spec.layer_norm else "RMSNormalization"
        attributes = {"axis": -1, "epsilon": self._spec.epsilon}
        scale, *bias = self._scales(name)
        if scale.shape is not None and len(scale.shape) == 2:  # [heads, D]: the norm of a head has weights of its own
            ones = self._graph.small(f"{name}.ones", torch.ones(self._spec.head_dim))
            x = self._graph.op(op, [x, ones], f"{name}.plain", **attributes)
            return self._graph.op("Mul", [x, scale], name)
        return self._graph.op(op, [x, scale, *bias], name, **attributes)

    def _maybe_norm(self, x: ir.Value, name: str | None) -> ir.Value:
        return x if name is None else self._norm(x, name)

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
