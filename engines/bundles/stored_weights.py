"""The weights that a bundle really holds: its cpu graph's own arithmetic, evaluated for one matrix at a time."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from coatrt.errors import BundleError, reason
from coatrt.models.matrices import EMBEDDING, ModelMatrices, fused_name

__all__ = ["held_weights"]


def held_weights(graph: Path, model: ModelMatrices) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield (name, weight [N, K]) of every matrix, decoded by the nodes of the graph that lead to it.

    The exporter calls the weight of a matrix `{name}.weight` [K, N] and the rows of the embedding `{name}.weight.rows`.
    Matrices that read one input may be one weight, side by side under their joint name. Nothing is folded, and one
    weight at a time is in memory.

    Args:
        graph: the cpu form, its weights file beside it.
        model: the matrices.

    Raises:
        BundleError: the graph lacks a matrix, or gives it another shape.
    """
    whole = onnx.load(graph, load_external_data=False)
    producers = {node.output[0]: node for node in whole.graph.node}
    known = {*producers, *(tensor.name for tensor in whole.graph.initializer)}
    for group in model.groups:
        joint = fused_name(group[0])
        if f"{joint}.weight" not in known:
            for name in group:
                yield name, _decoded(graph, whole, producers, name, model.by_name[name].N, model.by_name[name].K)
            continue
        sizes = [model.by_name[name].N for name in group]
        rows = _decoded(graph, whole, producers, joint, sum(sizes), model.by_name[group[0]].K)
        yield from zip(group, np.split(rows, np.cumsum(sizes)[:-1]), strict=True)


def _decoded(graph: Path, whole: Any, producers: Mapping[str, Any], name: str, N: int, K: int) -> NDArray[np.float32]:
    """Return one weight [N, K] of a graph.

    Raises:
        BundleError: the graph lacks it, or gives it another shape.
    """
    table = name == EMBEDDING
    value = f"{name}.weight.rows" if table else f"{name}.weight"
    inputs = {"input_ids": np.arange(N, dtype=np.int64)[None]} if table else {}
    session = _session(_part(whole, producers, value), graph.parent)
    try:
        found = session.run(None, inputs)[0]
    except Exception as error:  # onnxruntime's own, as of more rows than there are
        raise BundleError(f"{graph} does not decode {name} ({reason(error)}); build it again") from None
    weight = np.asarray(found[0] if table else found.T, np.float32)
    if weight.shape != (N, K):
        raise BundleError(f"{graph} holds {name} as {weight.shape}, the manifest says {(N, K)}; build it again")
    return weight


def _part(whole: Any, producers: Mapping[str, Any], value: str) -> Any:
    """Return a model of the nodes that `value` depends on, with it as the only output."""
    needed, open_values = set(), [value]
    while open_values:
        name = open_values.pop()
        if name not in needed:
            needed.add(name)
            open_values += producers[name].input if name in producers else []
    nodes = [node for node in whole.graph.node if node.output[0] in needed]  # in the order of the graph
    part = onnx.helper.make_graph(
        [*nodes, onnx.helper.make_node("Identity", [value], ["out"])],
        value,
        [entry for entry in whole.graph.input if entry.name in needed],
        [onnx.helper.make_empty_tensor_value_info("out")],
        [tensor for tensor in whole.graph.initializer if tensor.name in needed],
    )
    return onnx.helper.make_model(part, opset_imports=whole.opset_import, ir_version=whole.ir_version)


def _session(part: Any, directory: Path) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1  # a pool of threads costs more than it saves here
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory))
    try:
        return ort.InferenceSession(part.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises types of its own that share no public base
        raise BundleError(f"{directory} does not hold {part.graph.name} ({reason(error)}); build it again") from None
