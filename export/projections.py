"""The linear layers of a decoder in a graph: products, biases and LoRA, with fused groups as one product."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch

from coatrt.configs.lora_contract import LoraContract, LoraGroup
from coatrt.export.graph import GraphBuilder
from coatrt.export.weights import Table
from coatrt.models.matrices import fused_name

__all__ = ["NetworkWeights", "Projections"]


@dataclass(frozen=True)
class NetworkWeights:
    """The weights in one graph.

    Args:
        table: the embedding.
        single: matrix name → weight [K, N], including the head.
        fused: joint name → weight [K, sum of N] of a fused group, see `fused_name`.
        widths: matrix name → N.
    """

    table: Table
    single: Mapping[str, ir.Value]
    fused: Mapping[str, ir.Value]
    widths: Mapping[str, int]


class Projections:
    """Writes the linear layers.

    Args:
        graph: receives the nodes; its weights are stored already.
        weights: the weights in the graph.
        tensor: reads a bias of the checkpoint by name; returns None if there is none of that name.
        contract: LoRA inputs to add; None for a graph without LoRA.
        parallel: whether attention and MLP read the same input.
    """

    def __init__(
        self,
        graph: GraphBuilder,
        weights: NetworkWeights,
        tensor: Callable[[str], torch.Tensor | None],
        contract: LoraContract | None,
        parallel: bool,
    ) -> None:
        self._parallel = parallel
        self._graph, self._weights, self._tensor = graph, weights, tensor
        self._groups = {group.name: group for group in contract.groups} if contract is not None else {}
        self._lora: dict[str, tuple[ir.Value, ir.Value]] = {}
        self._sizes: dict[int, ir.Value] = {}  # width → [B, S, width]

    def add_inputs(self, ids: ir.Value) -> None:
        """Add the LoRA inputs; `ids` [B, S] are the graph's tokens."""
        graph, dtype = self._graph, self._graph.activations
        for group in self._groups.values():
            A = graph.input(group.A, dtype, (group.K, group.rank))
            self._lora[group.name] = A, graph.input(group.B, dtype, (group.rank, group.N))
        if self._groups and graph.is_engine:
            tokens = graph.op("Shape", [ids], "tokens.shape")
            for width in sorted({group.rank for group in self._groups.values() if self._shares_input(group)}):
                sizes = [tokens, graph.ints(width)]
                self._sizes[width] = graph.op("Concat", sizes, f"tokens.shape.{width}", axis=0)

    def linear(self, x: ir.Value, name: str) -> ir.Value:
        """Return x·W (+ bias) (+ (x·A)·B)."""
        graph, bias = self._graph, self._tensor(f"{name}.bias")
        out = graph.op("MatMul", [x, self._weights.single[name]], f"{name}.product")
        if bias is not None:
            out = graph.op("Add", [out, graph.small(f"{name}.bias", bias)], f"{name}.biased")
        return self._add_lora(out, x, name)

    def fused(self, x: ir.Value, names: Sequence[str]) -> ir.Value | None:
        """Return the outputs of `linear` for a fused group, concatenated.

        None if neither the weights nor the LoRA of the group are joined: single products are faster then. A checkpoint
        may have the group as one matrix (Phi-3's qkv_proj), named like the group.
        """
        graph, joint = self._graph, fused_name(names[0])
        if joint in self._weights.single:
            return self.linear(x, joint)
        weight = self._weights.fused.get(joint)
        if weight is None and joint not in self._lora:
            return None
        if weight is not None:
            out = graph.op("MatMul", [x, weight], f"{joint}.product")
        else:
            parts = [graph.op("MatMul", [x, self._weights.single[name]], f"{name}.product") for name in names]
            out = graph.op("Concat", parts, f"{joint}.products", axis=-1)
        biases = [self._tensor(f"{name}.bias") for name in names]
        if any(bias is not None for bias in biases):
            widths = [self._weights.widths[name] for name in names]
            rows = [torch.zeros(n) if bias is None else bias.float() for n, bias in zip(widths, biases, strict=True)]
            out = graph.op("Add", [out, graph.small(f"{joint}.bias", torch.cat(rows))], f"{joint}.biased")
        return self._add_lora(out, x, joint)

    def parts(self, x: ir.Value, names: Sequence[str], shares: Sequence[int]) -> list[ir.Value]:
        """Return the output of each matrix of a fused group: split from the output of `fused`, or computed singly.

        Args:
            x: the input.
            names: the matrices.
            shares: proportions of their widths.
        """
        fused = self.fused(x, names)
        if fused is None:
            return [self.linear(x, name) for name in names]
        return self.split(fused, names, shares)

    def split(self, fused: ir.Value, names: Sequence[str], shares: Sequence[int]) -> list[ir.Value]:
        """Return the parts of the output of `fused`; see `parts`."""
        widths = self._weights.widths
        whole = sum(widths[name] for name in names) if names[0] in widths else widths[fused_name(names[0])]
        return self._graph.split(
            fused, {f"{name}.part": whole * share // sum(shares) for name, share in zip(names, shares, strict=True)}
        )

    def _shares_input(self, group: LoraGroup) -> bool:
        return len(group.tensors) > 1 or self._parallel

    def _add_lora(self, out: ir.Value, x: ir.Value, name: str) -> ir.Value:
        """Return out + (x·A)·B if there is a LoRA of that name.

        TensorRT-RTX 1.7.1 fuses all products of one x into one. If A, which is not a constant, is among them, it copies
        all their weights in 16 bits in every step. A reshaped x hides from it that the input is the same.
        """
        graph = self._graph
        if name not in self._lora:
            return out
        (a, b), group = self._lora[name], self._groups[name]
        if graph.is_engine and self._shares_input(group):
            flat = graph.op("Reshape", [x, graph.ints(-1, group.K)], f"{name}.flat")
            low = graph.op("MatMul", [flat, a], f"{name}.lora_low.flat")
            low = graph.op("Reshape", [low, self._sizes[group.rank]], f"{name}.lora_low")
        else:
            low = graph.op("MatMul", [x, a], f"{name}.lora_low")
        change = graph.op("MatMul", [low, b], f"{name}.lora")
        return graph.op("Add", [out, change], f"{name}.adapted")
