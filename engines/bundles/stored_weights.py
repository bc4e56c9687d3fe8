"""The weights stored in a bundle, decoded one matrix at a time by the nodes of its own cpu graph."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from coatrt.errors import BundleError, reason
from coatrt.models.matrices import EMBEDDING, ModelMatrices, fused_name

__all__ = ["stored_weights"]


def stored_weights(graph: Path, model: ModelMatrices) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield (name, weight [N, K]) of every matrix, decoded by the graph's own nodes.

    In a graph, the weight of a matrix is named `{name}.weight` [K, N], and the rows of the embedding
    `{name}.weight.rows`. A fused group may be one weight under its joint name. Nothing is folded, and one weight at a
    time is in memory.

    Args:
        graph: the cpu form, with its weights file beside it.
        model: the matrices.

    Raises:
        BundleError: a matrix is missing in the graph, or has another shape there.
    """
    onnx_model = onnx.load(graph, load_external_data=False)
    producers = {node.output[0]: node for node in onnx_model.graph.node}
    values = {*producers, *(tensor.name for tensor in onnx_model.graph.initializer)}
    for group in model.groups:
        joint = fused_name(group[0])
        if f"{joint}.weight" not in values:
            for name in group:
                matrix = model.by_name[name]
                yield name, _decode_weight(graph, onnx_model, producers, name, matrix.N, matrix.K)
            continue
        sizes = [model.by_name[name].N for name in group]
        rows = _decode_weight(graph, onnx_model, producers, joint, sum(sizes), model.by_name[group[0]].K)
        yield from zip(group, np.split(rows, np.cumsum(sizes)[:-1]), strict=True)


def _decode_weight(
    graph: Path, onnx_model: Any, producers: Mapping[str, Any], name: str, N: int, K: int
) -> NDArray[np.float32]:
    """Return one weight [N, K] of a graph.

    Raises:
        BundleError: the weight is missing in the graph, or has another shape there.
    """
    table = name == EMBEDDING
    value = f"{name}.weight.rows" if table else f"{name}.weight"
    inputs = {"input_ids": np.arange(N, dtype=np.int64)[None]} if table else {}
    session = _session(_subgraph(onnx_model, producers, value), graph.parent)
    try:
        output = session.run(None, inputs)[0]
    except Exception as error:  # onnxruntime's own types, for a table with too few rows, for example
        raise BundleError(f"{graph} does not decode {name} ({reason(error)}); build it again") from None
    weight = np.asarray(output[0] if table else output.T, np.float32)
    if weight.shape != (N, K):
        raise BundleError(f"{graph}: {name} has shape {weight.shape}, the manifest says {(N, K)}; build it again")
    return weight


def _subgraph(onnx_model: Any, producers: Mapping[str, Any], value: str) -> Any:
    """Return a model of the nodes that `value` depends on, with it as the only output."""
    dependencies, stack = set(), [value]
    while stack:
        name = stack.pop()
        if name not in dependencies:
            dependencies.add(name)
            stack += producers[name].input if name in producers else []
    nodes = [node for node in onnx_model.graph.node if node.output[0] in dependencies]  # in the order of the graph
    part = onnx.helper.make_graph(
        [*nodes, onnx.helper.make_node("Identity", [value], ["out"])],
        value,
        [entry for entry in onnx_model.graph.input if entry.name in dependencies],
        [onnx.helper.make_empty_tensor_value_info("out")],
        [tensor for tensor in onnx_model.graph.initializer if tensor.name in dependencies],
    )
    return onnx.helper.make_model(part, opset_imports=onnx_model.opset_import, ir_version=onnx_model.ir_version)


def _session(part: Any, directory: Path) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1  # starting threads takes longer than they save here
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory))
    try:
        return ort.InferenceSession(part.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no public base class
        raise BundleError(f"{directory} lacks {part.graph.name} ({reason(error)}); build it again") from None
