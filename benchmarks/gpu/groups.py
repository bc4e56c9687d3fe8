"""Pieces of a layer: matrices joined or separate, LoRA added to them, attention with rotary inside or before it."""

from typing import Any

import numpy as np
import torch
from products import Graph, random_weight
from rows import Rows, arguments, run
from runtime import Bound, cold_copies, session, timed

RANK = 16
GROUPS = {
    "7b-qkv": (4096, (4096, 1024, 1024)),
    "7b-gate_up": (4096, (14336, 14336)),
    "7b-down": (14336, (4096,)),
    "1b-qkv": (2048, (2048, 512, 512)),
    "1b-gate_up": (2048, (8192, 8192)),
    "135m-qkv": (576, (576, 192, 192)),
    "135m-gate_up": (576, (1536, 1536)),
    "135m-down": (1536, (576,)),
}
"""Name → (K, the widths of the matrices that read the same input)."""
HEADS = {"7b": (32, 8, 128), "1b": (32, 8, 64), "135m": (9, 3, 64), "llama2-7b": (32, 32, 128)}
"""Name → (query heads, key heads, dimensions of a head)."""


def _measured(graph: Graph, tensors: dict[str, torch.Tensor], copies: int, dry: bool) -> dict[str, Any]:
    made = session(graph.model(), graph.weights, dry=dry, graph=True, level="none")
    bound = Bound(made, tensors, annotation=1)
    return {"us": timed(bound, 30, dry=dry, parts=copies), "nodes_per_copy": len(graph.nodes) / copies}


def group(name: str, base: str, lora: str, m: int, dry: bool) -> dict[str, Any]:
    """Time one group of matrices that read the same input.

    Args:
        name: one of GROUPS.
        base: "joined" for one product, "separate" for one per matrix; weights are int4-g32.
        lora: "none", "separate" (x·A, ·B and Add per matrix), "joined A" (one x·A, cut in parts) or "joined" (one
            x·A and one ·B, B block-diagonal).
        m: rows.
        dry: tiny shapes on the CPU.
    """
    K, widths = (64, (64, 32)) if dry else GROUPS[name]
    N, rank = sum(widths), RANK * len(widths)
    copies = cold_copies(N * K // 2, dry=dry, most=24)
    graph, device = Graph(), "cpu" if dry else "cuda"
    tensors = {graph.input("x", np.float16, [m, K]): torch.randn(m, K).half().to(device)}

    def given(label: str, *shape: int) -> str:
        tensors[label] = (torch.randn(*shape, device=device) * 0.02).half()
        return graph.input(label, np.float16, list(shape))

    def result(value: str, width: int) -> None:
        graph.output(value, np.float16, [m, width])
        tensors[value] = torch.empty(m, width, dtype=torch.float16, device=device)

    ranks = graph.constant("ranks", np.full(len(widths), RANK, np.int64))
    cuts = graph.constant("widths", np.array(widths, np.int64))
    for i in range(copies):
        lows: list[str] = []
        if lora in ("joined", "joined A"):
            low = graph.node("MatMul", ["x", given(f"A{i}", K, rank)], [f"low{i}"])
            lows = [f"low{i}.{j}" for j in range(len(widths))]
            if lora == "joined A":
                graph.node("Split", [low, ranks], lows, axis=-1)
        parts = [f"base{i}.{j}" for j in range(len(widths))]
        if base == "joined":
            whole = graph.product("x", random_weight("int4-g32", N, K), f"base{i}")
            if lora == "joined":
                update = graph.node("MatMul", [f"low{i}", given(f"B{i}", rank, N)], [f"update{i}"])
                whole = graph.node("Add", [whole, update], [f"sum{i}"])
            if lora in ("none", "joined"):
                result(whole, N)
                continue
            graph.node("Split", [whole, cuts], parts, axis=-1)
        for j, (part, width) in enumerate(zip(parts, widths, strict=True)):
            value = part
            if base == "separate":
                graph.product("x", random_weight("int4-g32", width, K), part)
            if lora != "none":
                if lora == "separate":
                    lows.append(graph.node("MatMul", ["x", given(f"A{i}.{j}", K, RANK)], [f"low{i}.{j}"]))
                update = graph.node("MatMul", [lows[j], given(f"B{i}.{j}", RANK, width)], [f"update{i}.{j}"])
                value = graph.node("Add", [part, update], [f"sum{i}.{j}"])
            result(value, width)
    return _measured(graph, tensors, copies, dry)


def _rotated(graph: Graph, name: str, inputs: list[str], heads: int, width: int) -> str:
    """Add a RotaryEmbedding node and return its output."""
    kind = {"num_heads": heads, "rotary_embedding_dim": width}
    return graph.node("RotaryEmbedding", inputs, [name], "com.microsoft", **kind)


def attention(name: str, rotary: str, context: int, slots: int, dry: bool) -> dict[str, Any]:
    """Time GroupQueryAttention for one new token, caches written in place.

    Args:
        name: one of HEADS.
        rotary: "inside" (q|k|v packed), "inside, q k v apart" or "before" (two RotaryEmbedding, q k v apart).
        context: positions filled before this token.
        slots: of the caches; also the total length input of the node, which a CUDA graph fixes.
        dry: tiny shapes on the CPU.
    """
    heads, kv, width = (4, 2, 64) if dry else HEADS[name]
    context, slots = (7, 16) if dry else (context, slots)
    cache = [1, kv, slots, width]
    nbytes = 4 * kv * context * width
    copies = cold_copies(nbytes, dry=dry, most=16)
    graph, device = Graph(), "cpu" if dry else "cuda"
    tensors: dict[str, torch.Tensor] = {}

    def given(label: str, shape: list[int], kind: Any = np.float16, value: int | None = None) -> str:
        made = torch.randn(shape, device=device).half() * 0.1 if value is None else torch.full(shape, value)
        tensors[label] = made.to(device, torch.int32 if kind == np.int32 else made.dtype)
        return graph.input(label, kind, shape)

    last = given("last", [1], np.int32, context)
    total = graph.constant("total", np.array(context + 1 if dry else slots, np.int32))
    angles = np.arange(slots)[:, None] * 500000.0 ** (-np.arange(0, width, 2) / width)
    cos, sin = (graph.constant(label, f(angles).astype(np.float16)) for label, f in (("cos", np.cos), ("sin", np.sin)))
    packed = given("qkv", [1, 1, (heads + 2 * kv) * width])
    q, k, v = (given(label, [1, 1, n * width]) for label, n in (("q", heads), ("k", kv), ("v", kv)))
    position = given("position", [1, 1], np.int64, context)
    for i in range(copies):
        past = [given(f"past{i}.{part}", cache) for part in "kv"]
        outs = [f"out{i}", f"present{i}.k", f"present{i}.v"]
        inputs = [packed, "", ""] if rotary == "inside" else [q, k, v]
        if rotary == "before":
            turned = ((value, count, [value, position, cos, sin]) for value, count in ((q, heads), (k, kv)))
            inputs[:2] = [_rotated(graph, f"turned{i}.{value}", ins, count, width) for value, count, ins in turned]
        tables, turn = ([], {}) if rotary == "before" else ([cos, sin], {"do_rotary": 1})
        graph.node(
            "GroupQueryAttention",
            [*inputs, *past, last, total, *tables],
            outs,
            "com.microsoft",
            num_heads=heads,
            kv_num_heads=kv,
            **turn,
        )
        graph.output(outs[0], np.float16, [1, 1, heads * width])
        tensors[outs[0]] = torch.empty(1, 1, heads * width, dtype=torch.float16, device=device)
        for out, source in zip(outs[1:], past, strict=True):
            graph.output(out, np.float16, cache)
            tensors[out] = tensors[source]
    used = {name for node in graph.nodes for name in node.input}
    graph.inputs[:] = [value for value in graph.inputs if value.name in used]
    found = _measured(graph, tensors, copies, dry)
    return {**found, "gb_s": round(nbytes / found["us"]["median"] / 1e3, 1), "copies": copies}


def compare(rows: Rows, names: list[str], m: int) -> None:
    """Time every way to write some groups."""
    for name in names:
        ways = [
            ("separate", "none"),
            ("separate", "separate"),
            ("joined", "none"),
            ("joined", "joined"),
            ("joined", "joined A"),
            ("separate", "joined A"),
        ]
        for base, lora in ways if len(GROUPS[name][1]) > 1 else ways[:2]:
            key = f"group/{name}/M{m}/base {base}/LoRA {lora}"
            rows.measure(key, lambda name=name, base=base, lora=lora: group(name, base, lora, m, rows.dry))


def main() -> None:
    """Measure."""
    rows, _ = arguments(__doc__.splitlines()[0])
    compare(rows, list(GROUPS)[: 1 if rows.dry else None], 1)
    for slots in (4096, 8192):
        for name in list(HEADS)[: 1 if rows.dry else None]:
            for context in (128, 1024, 4095):
                for rotary in ("inside", "before", "inside, q k v apart"):
                    if slots == 8192 and (rotary != "inside" or name == "llama2-7b"):
                        continue
                    key = f"attention/{name}/{slots} slots/{context} filled/rotary {rotary}"
                    rows.measure(
                        key,
                        lambda name=name, rotary=rotary, context=context, slots=slots: attention(
                            name, rotary, context, slots, rows.dry
                        ),
                    )
    if not rows.dry:
        compare(rows, ["7b-qkv", "7b-gate_up", "1b-qkv", "1b-gate_up"], 512)


if __name__ == "__main__":
    run(main)
