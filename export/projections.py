"""The linear matrices of a decoder in a graph: products, biases, LoRA, and those that read one input as one product."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch

from coatrt.configs.lora_contract import LoraContract, lora_groups
from coatrt.export.graph import GraphBuilder
from coatrt.export.joining import JoinedWeight
from coatrt.export.weights import Table
from coatrt.models.matrices import fused_name

__all__ = ["NetworkWeights", "Projections"]


@dataclass(frozen=True)
class NetworkWeights:
    """The weights in one graph.

    Args:
        table: the embedding.
        alone: matrix name → weight [K, N], the head among them.
        together: joint name → the weights of the matrices that read one input, see `fused_name`.
    """

    table: Table
    alone: Mapping[str, ir.Value]
    together: Mapping[str, JoinedWeight]


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
        self._graph, self._weights, self._tensor, self._contract = graph, weights, tensor, contract
        self._groups = {group.name: group for group in lora_groups(contract)} if contract is not None else {}
        self._lora: dict[str, tuple[ir.Value, ir.Value]] = {}
        self._low: dict[str, ir.Value] = {}  # x·A of matrices that read the same x
        self._products: dict[str, ir.Value] = {}  # x·W of matrices that read the same x
        self._finished: dict[str, ir.Value] = {}  # the same, bias and LoRA added

    def add_inputs(self) -> None:
        """Add the LoRA inputs; in the cuda form one pair for matrices whose weights are one."""
        graph = self._graph

        def pair(shapes: Mapping[str, tuple[int, int]]) -> tuple[ir.Value, ir.Value]:
            A, B = (graph.input(name, graph.activations, shape) for name, shape in shapes.items())
            return A, B

        for tensor in self._contract.tensors if self._contract is not None else ():
            joint = fused_name(tensor.matrix)
            if not (graph.is_cuda and joint in self._groups and joint in self._weights.together):
                shapes = {tensor.A: (tensor.K, tensor.rank), tensor.B: (tensor.rank, tensor.N)}
                self._lora[tensor.matrix] = pair(shapes)
            elif joint not in self._lora:
                self._lora[joint] = pair(self._groups[joint].shapes)

    def together(self, x: ir.Value, joint: str) -> ir.Value | None:
        """Multiply x by the matrices that read it, as far as they are one in the graph.

        Returns:
            In the cuda form the result of all, bias and LoRA added; else None, and `linear` finds its parts.
        """
        graph, whole = self._graph, self._weights.together.get(joint)
        if graph.is_engine and joint in self._groups:
            self._multiply_low(x, joint)
        if whole is None:
            return None
        out = graph.op("MatMul", [x, whole.weight], f"{joint}.product")
        if not graph.is_cuda:
            parts = graph.split(out, {f"{name}.product": N for name, N in whole.widths.items()})
            self._products.update(zip(whole.widths, parts, strict=True))
            return None
        biases = {name: self._tensor(f"{name}.bias") for name in whole.widths}
        if any(bias is not None for bias in biases.values()):
            rows = [torch.zeros(whole.widths[name]) if one is None else one.float() for name, one in biases.items()]
            out = graph.op("Add", [out, graph.small(f"{joint}.bias", torch.cat(rows))], f"{joint}.biased")
        return self._adapted(out, x, joint)

    def cut(self, whole: ir.Value, joint: str) -> None:
        """Cut the result of matrices that are one into theirs, for `linear`."""
        widths = self._weights.together[joint].widths
        parts = self._graph.split(whole, {f"{name}.part": N for name, N in widths.items()})
        self._finished.update(zip(widths, parts, strict=True))

    def linear(self, x: ir.Value, name: str) -> ir.Value:
        """Return x·W (+ bias) (+ (x·A)·B)."""
        if name in self._finished:
            return self._finished.pop(name)
        graph, bias, out = self._graph, self._tensor(f"{name}.bias"), self._products.pop(name, None)
        if out is None:
            out = graph.op("MatMul", [x, self._weights.alone[name]], f"{name}.product")
        if bias is not None:
            out = graph.op("Add", [out, graph.small(f"{name}.bias", bias)], f"{name}.biased")
        return self._adapted(out, x, name)

    def _adapted(self, out: ir.Value, x: ir.Value, name: str) -> ir.Value:
        """Return out + (x·A)·B where there is a LoRA of that name."""
        graph = self._graph
        if name not in self._lora:
            return out
        a, b = self._lora[name]
        low = self._low.get(name) or graph.op("MatMul", [x, a], f"{name}.lora_low")
        return graph.op("Add", [out, graph.op("MatMul", [low, b], f"{name}.lora")], f"{name}.adapted")

    def _multiply_low(self, x: ir.Value, joint: str) -> None:
        """Multiply x by the A of several matrices at once; one product is faster than several of rank 16.

        TensorRT-RTX 1.7.1 also builds SmolLM2-135M in half the time.
        """
        graph, tensors = self._graph, self._groups[joint].tensors
        wide = graph.op("Concat", [self._lora[tensor.matrix][0] for tensor in tensors], f"{joint}.lora_A", axis=1)
        low = graph.op("MatMul", [x, wide], f"{joint}.lora_low")
        parts = graph.split(low, {f"{tensor.matrix}.lora_low": tensor.rank for tensor in tensors})
        self._low.update({tensor.matrix: part for tensor, part in zip(tensors, parts, strict=True)})
