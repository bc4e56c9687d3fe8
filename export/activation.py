"""The activation of an MLP as graph nodes."""

from collections.abc import Callable

import onnx_ir as ir
import torch

from coatrt.export.graph import GraphBuilder
from coatrt.models.spec import DecoderSpec

__all__ = ["activated"]


def activated(
    graph: GraphBuilder, spec: DecoderSpec, x: ir.Value, prefix: str, tensor: Callable[[str], torch.Tensor | None]
) -> ir.Value:
    """Return the activation of x.

    Args:
        graph: receives the nodes.
        spec: names the activation.
        x: the input.
        prefix: name of the MLP.
        tensor: reads the parameters of the activation, if it has any.
    """
    name = f"{prefix}.activated"
    if spec.activation == "silu" and graph.is_engine:
        return graph.op("Swish", [x], name)
    if spec.activation == "silu":  # one kernel; ONNX Runtime expands Swish into three
        (out,) = graph.runtime_op("QuickGelu", [x], [name], alpha=1.0)
        return out
    if spec.activation == "relu2":
        positive = graph.op("Relu", [x], f"{prefix}.positive")
        return graph.op("Mul", [positive, positive], name)
    if spec.activation == "xielu":
        return _xielu(graph, x, prefix, tensor)
    return graph.op("Gelu", [x], name, approximate="tanh" if spec.activation == "gelu_tanh" else "none")


def _xielu(graph: GraphBuilder, x: ir.Value, prefix: str, tensor: Callable[[str], torch.Tensor | None]) -> ir.Value:
    """Return a · max(x, 0)² + b · (elu(x) − x) + beta · x (Huang and Schlag 2024, arXiv 2411.13010)."""
    values = [tensor(f"{prefix}.act_fn.{key}") for key in ("alpha_p", "alpha_n", "beta")]
    above, under, slope = (value.float() for value in values if value is not None)
    softplus, beta = torch.nn.functional.softplus, float(slope)
    a, b = float(softplus(above)), beta + float(softplus(under))
    positive = graph.op("Relu", [x], f"{prefix}.positive")
    raised = graph.op("Mul", [positive, graph.real(a)], f"{prefix}.raised")
    square = graph.op("Mul", [positive, raised], f"{prefix}.square")
    below = graph.op("Sub", [graph.op("Elu", [x], f"{prefix}.elu"), x], f"{prefix}.below")
    lowered = graph.op("Mul", [below, graph.real(b)], f"{prefix}.lowered")
    bend = graph.op("Add", [square, lowered], f"{prefix}.bend")
    sloped = graph.op("Mul", [x, graph.real(beta)], f"{prefix}.slope")
    return graph.op("Add", [bend, sloped], f"{prefix}.activated")
