"""A Llama-shaped decoder written with ONNX Runtime's own operators, random weights, LoRA as inputs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lora import lora_update
from products import Graph, random_weight

__all__ = ["MODELS", "RANK", "Decoder", "Shape", "mixed"]

RANK = 16


@dataclass(frozen=True)
class Shape:
    """The shape of a Llama-like model.

    Args:
        hidden: width of the residual stream.
        inner: width of the MLP.
        layers: number of layers.
        heads: query heads.
        kv_heads: key and value heads.
        vocabulary: rows of the embedding.
        tied: whether the head is the embedding.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool

    @property
    def width(self) -> int:
        """Dimensions of a head."""
        return 128 if self.hidden >= 4096 else 64


MODELS = {
    "tiny": Shape(128, 256, 2, 2, 1, 256, True),
    "135m": Shape(576, 1536, 30, 9, 3, 49152, True),  # SmolLM2-135M
    "1b": Shape(2048, 8192, 16, 32, 8, 128256, True),  # Llama 3.2 1B
    "7b": Shape(4096, 14336, 32, 32, 8, 32768, False),  # Mistral 7B v0.3
}


def mixed(layer: int, group: str) -> str:
    """Return the format of a group of matrices in a mixed configuration: a third int8, the rest 4 bits."""
    return "int8-g128" if (layer * 7 + len(group)) % 3 == 0 else "int4-g64" if (layer + len(group)) % 2 else "nvfp4"


@dataclass
class Decoder:
    """The graph of one decoder, and its inputs and outputs.

    Inputs: input_ids [1, S], last [1] (which position's logits), ends [1] int32 (last slot filled by this call), total
    (int32 on the host; the slots of the caches where a CUDA graph is captured), caches, LoRA. Outputs: logits
    [1, 1, V] and the caches, in place.

    Args:
        shape: of the model.
        formats: (layer, group) → weight format; layer −1 for the head.
        lora: whether there are LoRA inputs.
        joined: q|k|v and gate|up as one product each, and their LoRA as one pair with a block-diagonal B; otherwise
            every matrix and its LoRA apart.
        slots: of the caches.
        packed: whether an integer table is read packed (GatherBlockQuantized).
        form: how the LoRA is multiplied, see `lora.LORA_FORMS`.
        folded: whether the LoRA of the matrices that end in the residual stream is added as the bias of the norm
            behind it, which a graph for one token can.
    """

    shape: Shape
    formats: Callable[[int, str], str]
    lora: bool
    joined: bool = True
    slots: int = 2048
    packed: bool = True
    form: str = "fp16"
    folded: bool = False
    graph: Graph = field(default_factory=Graph)
    lora_inputs: dict[str, tuple[Any, tuple[int, ...]]] = field(default_factory=dict)
    """Input name → numpy dtype and shape."""
    read_bytes: int = 0
    """Bytes of weights and scales that one token reads."""

    def __post_init__(self) -> None:
        graph, shape = self.graph, self.shape
        graph.input("input_ids", np.int64, [1, "S"])
        graph.input("last", np.int64, [1])
        graph.input("ends", np.int32, [1])
        graph.input("total", np.int32, [])
        angles = np.arange(self.slots)[:, None] * 500000.0 ** (-np.arange(0, shape.width, 2) / shape.width)
        graph.weight("cos", np.cos(angles).astype(np.float16))
        graph.weight("sin", np.sin(angles).astype(np.float16))
        graph.weight("ones", np.ones(shape.hidden, np.float16))
        graph.constant("flat", np.array([-1], np.int64))
        x = self._embedded()
        normed = graph.node("SimplifiedLayerNormalization", [x, "ones"], ["norm.first"], axis=-1, epsilon=1e-5)
        for layer in range(shape.layers):
            normed, x = self._added(x, self._attention(normed, layer), f"{layer}.middle")
            normed, x = self._added(x, self._mlp(normed, layer), f"{layer}.end")
        normed = graph.node("Gather", [normed, "last"], ["hidden"], axis=1)
        self._head(normed)

    def _embedded(self) -> str:
        graph, shape, text = self.graph, self.shape, self.formats(-1, "head")
        ids = "input_ids"
        if self.packed and text.startswith("int"):
            table = random_weight(text, shape.vocabulary, shape.hidden)
            codes = graph.weight("table.codes", table.arrays["codes"].reshape(shape.vocabulary, -1))
            scales = graph.weight("table.scales", table.arrays["scales"])
            attributes = {"bits": table.attributes["bits"], "block_size": table.attributes["block_size"]}
            return graph.node(
                "GatherBlockQuantized",
                [codes, ids, scales],
                ["rows"],
                "com.microsoft",
                gather_axis=0,
                quantize_axis=1,
                **attributes,
            )
        table = random_weight("fp16", shape.hidden, shape.vocabulary).arrays["weight"]
        return graph.node("Gather", [graph.weight("table", table), ids], ["rows"], axis=0)

    def _head(self, x: str) -> None:
        graph, shape, text = self.graph, self.shape, self.formats(-1, "head")
        if text == "fp16" and shape.tied:
            graph.node("FusedMatMul", [x, "table"], ["logits"], "com.microsoft", transB=1)
            self.read_bytes += graph.weights["table"].nbytes
        else:
            weight = random_weight(text, shape.vocabulary, shape.hidden)
            graph.product(x, weight, "logits")
            self.read_bytes += weight.nbytes
        graph.output("logits", np.float16, [1, 1, shape.vocabulary])

    def _added(self, x: str, update: tuple[str, ...], name: str) -> tuple[str, str]:
        """Return the norm of x + update, and the sum; a second part of the update has one row and goes as the bias."""
        bias = [self.graph.node("Reshape", [part, "flat"], [f"{part}.flat"]) for part in update[1:]]
        outputs, inputs = [f"{name}.norm", "", "", f"{name}.sum"], [x, update[0], "ones", *bias]
        self.graph.node("SkipSimplifiedLayerNormalization", inputs, outputs, "com.microsoft", epsilon=1e-5)
        return outputs[0], outputs[3]

    def _product(self, x: str, name: str, text: str, K: int, widths: dict[str, int]) -> list[str]:
        """Return x·W of matrices with a common input, one value where they are joined, else one each."""
        if self.joined:
            return [self._linear(x, name, text, K, sum(widths.values()), RANK * len(widths))]
        return [self._linear(x, f"{name}.{part}", text, K, N, RANK) for part, N in widths.items()]

    def _linear(self, x: str, name: str, text: str, K: int, N: int, rank: int) -> str:
        parts = self._parts(x, name, text, K, N, rank)
        return self.graph.node("Add", list(parts), [f"{name}.adapted"]) if len(parts) > 1 else parts[0]

    def _parts(self, x: str, name: str, text: str, K: int, N: int, rank: int) -> tuple[str, ...]:
        """Return x·W and, where there is a LoRA, (x·A)·B."""
        weight = random_weight(text, N, K)
        self.read_bytes += weight.nbytes
        base = self.graph.product(x, weight, f"{name}.base")
        if not self.lora:
            return (base,)
        update, inputs = lora_update(self.graph, self.form, x, name, K, N, rank)
        self.lora_inputs |= inputs
        return base, update

    def _last(self, x: str, name: str, text: str, K: int, N: int) -> tuple[str, ...]:
        """Return what a matrix adds to the residual stream."""
        return self._parts(x, name, text, K, N, RANK) if self.folded else (self._linear(x, name, text, K, N, RANK),)

    def _attention(self, x: str, layer: int) -> tuple[str, ...]:
        graph, shape = self.graph, self.shape
        q, kv = shape.heads * shape.width, shape.kv_heads * shape.width
        parts = self._product(x, f"{layer}.qkv", self.formats(layer, "qkv"), shape.hidden, {"q": q, "k": kv, "v": kv})
        cache = [1, shape.kv_heads, self.slots, shape.width]
        past = [graph.input(f"past.{layer}.{part}", np.float16, cache) for part in "kv"]
        present = [graph.output(f"present.{layer}.{part}", np.float16, cache) for part in "kv"]
        inputs = [*parts, *[""] * (3 - len(parts)), *past, "ends", "total", "cos", "sin"]
        mixed_heads = graph.node(
            "GroupQueryAttention",
            inputs,
            [f"{layer}.mixed", *present],
            "com.microsoft",
            num_heads=shape.heads,
            kv_num_heads=shape.kv_heads,
            do_rotary=1,
        )
        return self._last(mixed_heads, f"{layer}.o", self.formats(layer, "o"), q, shape.hidden)

    def _mlp(self, x: str, layer: int) -> tuple[str, ...]:
        graph, shape = self.graph, self.shape
        widths = {"gate": shape.inner, "up": shape.inner}
        parts = self._product(x, f"{layer}.gate_up", self.formats(layer, "gate_up"), shape.hidden, widths)
        if self.joined:
            (whole,), parts = parts, [f"{layer}.gate", f"{layer}.up"]
            graph.node("Split", [whole], parts, axis=-1, num_outputs=2)
        active = graph.node("QuickGelu", [parts[0]], [f"{layer}.active"], "com.microsoft", alpha=1.0)
        gated = graph.node("Mul", [active, parts[1]], [f"{layer}.gated"])
        return self._last(gated, f"{layer}.down", self.formats(layer, "down"), shape.inner, shape.hidden)
