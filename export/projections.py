"""The linear matrices of a decoder in a graph: products, biases, LoRA; those that read one input side by side."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch

from coatrt.configs.lora_contract import LoraContract
from coatrt.export.graph import GraphBuilder
from coatrt.export.weights import Table
from coatrt.models.matrices import fused_name

__all__ = ["NetworkWeights", "Projections"]


@dataclass(frozen=True)
class NetworkWeights:
    """The weights in one graph.

    Args:
        table: the embedding.
        alone: matrix name → weight [K, N], the head among them.
        together: joint name → weight [K, sum of N] of the matrices that read one input, see `fused_name`.
        widths: matrix name → N.
    """

    table: Table
    alone: Mapping[str, ir.Value]
    together: Mapping[str, ir.Value]
    widths: Mapping[str, int]


class Projections:
    """Multiplies with the matrices of the layers.

    Args:
        graph: receives the nodes; the weights are in it already.
        weights: what it holds of them.
        tensor: reads a small tensor of the checkpoint by name, None where it has none.
        contract: LoRA inputs to add; None for a graph without.
    """

    def __init__(
        self,
        graph: GraphBuilder,
        weights: NetworkWeights,
        tensor: Callable[[str], torch.Tensor | None],
        contract: LoraContract | None,
    ) -> None:
        self._graph, self._weights, self._tensor = graph, weights, tensor
        self._groups = {group.name: group for group in contract.groups} if contract is not None else {}
        self._lora: dict[str, tuple[ir.Value, ir.Value]] = {}
        self._sizes: dict[int, ir.Value] = {}  # width → [B, S, width]

    def add_inputs(self, ids: ir.Value) -> None:
        """Add the LoRA inputs to a graph that reads the tokens `ids` [B, S]."""
        graph, dtype = self._graph, self._graph.activations
        for group in self._groups.values():
            A = graph.input(group.A, dtype, (group.K, group.rank))
            self._lora[group.name] = A, graph.input(group.B, dtype, (group.rank, group.N))
        if self._groups and graph.is_engine:
            tokens = graph.op("Shape", [ids], "tokens.shape")
            for width in sorted({group.rank for group in self._groups.values() if len(group.tensors) > 1}):
                sizes = [tokens, graph.ints(width)]
                self._sizes[width] = graph.op("Concat", sizes, f"tokens.shape.{width}", axis=0)

    def linear(self, x: ir.Value, name: str) -> ir.Value:
        """Return x·W (+ bias) (+ (x·A)·B)."""
        graph, bias = self._graph, self._tensor(f"{name}.bias")
        out = graph.op("MatMul", [x, self._weights.alone[name]], f"{name}.product")
        if bias is not None:
            out = graph.op("Add", [out, graph.small(f"{name}.bias", bias)], f"{name}.biased")
        return self._adapted(out, x, name)

    def together(self, x: ir.Value, names: Sequence[str]) -> ir.Value | None:
        """Return what `linear` gives for matrices that read x, side by side.

        None where neither their weights nor their LoRA are one: each is then better multiplied on its own.
        """
        graph, joint = self._graph, fused_name(names[0])
        whole = self._weights.together.get(joint)
        if whole is None and joint not in self._lora:
            return None
        if whole is not None:
            out = graph.op("MatMul", [x, whole], f"{joint}.product")
        else:
            parts = [graph.op("MatMul", [x, self._weights.alone[name]], f"{name}.product") for name in names]
            out = graph.op("Concat", parts, f"{joint}.products", axis=-1)
        biases = [self._tensor(f"{name}.bias") for name in names]
        if any(bias is not None for bias in biases):
            widths = [self._weights.widths[name] for name in names]
            rows = [torch.zeros(n) if bias is None else bias.float() for n, bias in zip(widths, biases, strict=True)]
            out = graph.op("Add", [out, graph.small(f"{joint}.bias", torch.cat(rows))], f"{joint}.biased")
        return self._adapted(out, x, joint)

    def parts(self, x: ir.Value, whole: ir.Value | None, names: Sequence[str]) -> list[ir.Value]:
        """Return what `linear` gives for each of the matrices that read x, cut from what `together` gave."""
        if whole is None:
            return [self.linear(x, name) for name in names]
        return self._graph.split(whole, {f"{name}.part": self._weights.widths[name] for name in names})

    def _adapted(self, out: ir.Value, x: ir.Value, name: str) -> ir.Value:
        """Return out + (x·A)·B where there is a LoRA of that name.

        TensorRT-RTX 1.7.1 multiplies by everything that reads one x at once. With an A among it, which is no constant,
        that is a copy in 16 bits of all the weights, made in every step. It does not see that a flat x is the same.
        """
        graph = self._graph
        if name not in self._lora:
            return out
        (a, b), group = self._lora[name], self._groups[name]
        if graph.is_engine and len(group.tensors) > 1:
            flat = graph.op("Reshape", [x, graph.ints(-1, group.K)], f"{name}.flat")
            low = graph.op("MatMul", [flat, a], f"{name}.lora_low.flat")
            low = graph.op("Reshape", [low, self._sizes[group.rank]], f"{name}.lora_low")
        else:
            low = graph.op("MatMul", [x, a], f"{name}.lora_low")
        change = graph.op("MatMul", [low, b], f"{name}.lora")
        return graph.op("Add", [out, change], f"{name}.adapted")
