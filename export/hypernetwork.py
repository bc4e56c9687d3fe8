"""Adapter → hypernet.onnx: one integer per matrix in, every LoRA tensor of the contract out.

Format fields, layers, module kinds, features and their averages are constants of the graph, so that a service needs no
feature code. The input `formats`, int64 [M], gives for each target module (contract order) the index of its format in
the list "formats" of `hypernet.json`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from coatrt.adapter.adapter import Adapter
from coatrt.export.graph import Nodes
from coatrt.system.json_data import write_json

__all__ = ["export_hypernetwork"]

_LARGE = 1 << 30  # bytes above which tensors go to a separate file: a protobuf is limited to 2 GiB


class _Graph(Nodes):
    """The hypernetwork under construction."""

    def __init__(self) -> None:
        super().__init__()
        self._constants: dict[str, ir.Value] = {}

    def constant(self, data: torch.Tensor | NDArray[Any] | list[int], name: str) -> ir.Value:
        if name not in self._constants:
            array = data.detach().cpu().contiguous().numpy() if isinstance(data, torch.Tensor) else np.asarray(data)
            self._constants[name] = self.initializer(ir.tensor(array, name=name), name)
        return self._constants[name]


def export_hypernetwork(adapter: Adapter, directory: str | Path) -> None:
    """Write hypernet.onnx and hypernet.json of a trained adapter into an existing directory."""
    directory = Path(directory)
    graph = _Graph()
    formats = graph.input("formats", ir.DataType.INT64, [len(adapter.encoder.names)])
    updates = _write_theta(graph, adapter, formats) if adapter.lora.theta is not None else None
    _write_lora(graph, adapter, formats, updates)
    model = graph.model("hypernetwork")
    initializers = model.graph.initializers.values()
    size = sum(value.const_value.nbytes for value in initializers if value.const_value is not None)
    ir.save(model, directory / "hypernet.onnx", external_data="hypernet.bin" if size > _LARGE else None)
    write_json(
        directory / "hypernet.json",
        {"matrices": list(adapter.encoder.names), "formats": [str(fmt) for fmt in adapter.description.formats]},
    )


def _write_theta(graph: _Graph, adapter: Adapter, formats: ir.Value) -> ir.Value:
    """Write embeddings, features and the two linear layers; return U, float32 [M, r, r]."""
    theta, encoder = adapter.lora.theta, adapter.encoder
    assert theta is not None
    fields = graph.op("Gather", [graph.constant(encoder.fields, "format_fields"), formats], "fields")  # [M, 5]
    embeddings = []
    for i, table in enumerate(theta.embeddings.parameters()):
        name = f"embedding_{i}"
        weights = graph.constant(table, f"{name}.weight")
        if i < encoder.fields.shape[1]:
            index = graph.op("Gather", [fields, graph.constant(np.array(i), f"column_{i}")], f"{name}.index", axis=1)
        else:
            index = graph.constant(encoder.places[:, i - encoder.fields.shape[1]], f"{name}.index")
        embeddings.append(graph.op("Gather", [weights, index], name))  # [M, width]
    state = graph.op("Concat", embeddings, "embedded", axis=1)
    scale, shift = graph.constant(theta.norm.weight, "norm.weight"), graph.constant(theta.norm.bias, "norm.bias")
    state = graph.op("LayerNormalization", [state, scale, shift], "normed", axis=-1, epsilon=theta.norm.eps)
    if theta.preset == "coatrt":
        state = graph.op("Concat", [state, _write_features(graph, adapter, formats)], "seen", axis=1)
    for name, layer in (("hidden", theta.hidden), ("out", theta.out)):
        weight, bias = graph.constant(layer.weight, f"{name}.weight"), graph.constant(layer.bias, f"{name}.bias")
        state = graph.op("Gemm", [state, weight, bias], name, transB=1)
        if name == "hidden":
            state = graph.op("Mul", [state, graph.op("Sigmoid", [state], "gate")], "silu")
    return graph.op("Reshape", [state, graph.constant([-1, theta.rank, theta.rank], "square")], "U")


def _write_features(graph: _Graph, adapter: Adapter, formats: ir.Value) -> ir.Value:
    """Write the features of `coatrt.adapter.features`, float32 [M, 4]."""
    encoder = adapter.encoder
    count, choices, _ = encoder.own.shape
    table = graph.constant(encoder.own.reshape(count * choices, 2), "format_features")
    rows = graph.op("Add", [formats, graph.constant(torch.arange(count) * choices, "row_starts")], "rows")
    own = graph.op("Gather", [table, rows], "own_features")  # [M, 2]
    bits = graph.op("Gather", [own, graph.constant([0], "column_bits")], "bits", axis=1)  # [M, 1]
    averages = graph.op("MatMul", [graph.constant(encoder.shares, "shares"), bits], "averages")  # [1 + layers, 1]
    whole = graph.op("Gather", [averages, graph.constant(torch.zeros(count, dtype=torch.int64), "whole")], "whole_bits")
    layer = graph.op("Gather", [averages, graph.constant(encoder.places[:, 0] + 1, "layer_rows")], "layer_bits")
    return graph.op("Concat", [own, whole, layer], "features", axis=1)


def _write_lora(graph: _Graph, adapter: Adapter, formats: ir.Value, updates: ir.Value | None) -> None:
    """Write A unchanged and B' = s·(I + U)ᵀB + C per stack of equal shapes, as outputs in contract order."""
    contract, lora = adapter.description.contract, adapter.lora
    outputs: dict[str, ir.Value] = {}
    transposed = graph.op("Transpose", [updates], "U_transposed", perm=[0, 2, 1]) if updates is not None else None
    for stack, (rows, A, B) in enumerate(lora.stacks()):
        name = f"stack_{stack}"
        b = graph.constant(B.detach() * contract.scale(contract.tensors[rows[0]]), f"{name}.B")
        members = graph.constant(rows, f"{name}.rows")
        if transposed is not None:
            update = graph.op("Gather", [transposed, members], f"{name}.U")
            if B.shape[1] < contract.rank:
                edges = [graph.constant([at, at], f"{name}.edge{at}") for at in (0, B.shape[1])]
                update = graph.op("Slice", [update, *edges, graph.constant([1, 2], "square_axes")], f"{name}.U_used")
            change = graph.op("MatMul", [update, b], f"{name}.change")
            b = graph.op("Add", [b, change], f"{name}.folded")  # [m, r, N]
        if lora.compensated:
            count, choices, *shape = lora.C[stack].shape
            table = graph.constant(lora.C[stack].reshape(count * choices, *shape), f"{name}.C")
            starts = graph.constant(torch.arange(count) * choices, f"{name}.C_starts")
            index = graph.op("Gather", [formats, members], f"{name}.formats")
            index = graph.op("Add", [index, starts], f"{name}.C_rows")
            term = graph.op("Gather", [table, index], f"{name}.C_half")
            term = graph.op("Cast", [term], f"{name}.C_used", to=ir.DataType.FLOAT)
            b = graph.op("Add", [b, term], f"{name}.compensated")
        for i, row in enumerate(rows):
            tensor = contract.tensors[row]
            at = graph.constant(np.array(i), f"place_{i}")
            outputs[tensor.A] = graph.op("Identity", [graph.constant(A[i], f"{tensor.A}.trained")], tensor.A)
            outputs[tensor.B] = graph.op("Gather", [b, at], tensor.B, axis=0)
    for name, size in contract.shapes.items():
        graph.output(outputs[name], ir.DataType.FLOAT, size)
