"""Checks a graph against its bundle without running it: names and shapes of inputs and outputs, and file sizes."""

from pathlib import Path

from coatrt.configs.lora_contract import DecoderIO, LoraContract
from coatrt.errors import BundleError, reason
from coatrt.models.matrices import ModelMatrices
from coatrt.system.onnx_files import read_onnx

__all__ = ["check_graph", "check_matrices"]

_TOKENS = ("input_ids", "position_ids", "write_index", "logits_index")
_CUDA_TOKENS = ("input_ids", "seqlens_k", "total_sequence_length", "logits_rows")


def check_graph(form: str, graph: Path, io: DecoderIO, contract: LoraContract) -> None:
    """Refuse a graph that does not match `io` and `contract`, without running it.

    Args:
        form: form of the graph: "engine", "cpu" or "cuda".
        graph: an ONNX file, with its weights beside it.
        io: its inputs and outputs in the manifest.
        contract: its LoRA inputs.

    Raises:
        BundleError: the graph is damaged or invalid ONNX, an input or output is missing or has another shape, or it
            reads past the end of its weights file.
    """
    import onnx

    content = read_onnx(graph)
    cache = (None, io.kv_heads, io.cache_length, io.head_dim)
    inputs: dict[str, tuple[int | None, ...]] = dict.fromkeys(_CUDA_TOKENS if form == "cuda" else _TOKENS, ())
    inputs |= dict.fromkeys(io.past_names, cache) | dict(contract.inputs)
    outputs: dict[str, tuple[int | None, ...]] = {"logits": (None, None, io.vocabulary)}
    outputs |= dict.fromkeys(io.present_names, cache)
    for what, expected, actual in (("input", inputs, content.inputs), ("output", outputs, content.outputs)):
        for name, shape in expected.items():
            if name not in actual:
                raise BundleError(f"{graph} has no {what} {name}, which its bundle names; build the bundle again")
            graph_shape = actual[name]
            pairs = [(size, other) for size, other in zip(shape, graph_shape, strict=False) if size is not None]
            if shape and graph_shape and (len(shape) != len(graph_shape) or any(a != b for a, b in pairs)):
                text = tuple("any" if size is None else size for size in shape)
                raise BundleError(
                    f"{graph} has {what} {name} with shape {graph_shape}, its bundle says {text}; build it again"
                )
    for location, size in content.external.items():
        file_size = (graph.parent / location).stat().st_size
        if size > file_size:
            raise BundleError(
                f"{graph} reads {size} bytes of {location}, which has {file_size}; build the bundle again"
            )
    try:
        onnx.checker.check_model(str(graph))
    except Exception as error:  # onnx's errors share no public base class
        raise BundleError(f"{graph} is not a valid ONNX graph ({reason(error)}); build the bundle again") from None


def check_matrices(directory: Path, model: ModelMatrices, io: DecoderIO, contract: LoraContract) -> None:
    """Refuse matrices in a manifest whose sizes differ from those in its decoder and its LoRA contract.

    Args:
        directory: directory of the bundle, for messages.
        model: the matrices.
        io: inputs and outputs of a graph that `check_graph` has checked.
        contract: the LoRA contract.

    Raises:
        BundleError: the size of a matrix differs.
    """
    for matrix in model.matrices:
        pair = contract.by_matrix.get(matrix.name)
        size = (matrix.N, matrix.K) if not matrix.is_table else (matrix.N,)
        expected = (pair.N, pair.K) if pair is not None else (io.vocabulary,) if matrix.is_table else ()
        if size != expected:
            raise BundleError(
                f"{directory}: {matrix.name} has size {size} in the manifest, {expected} in decoder and LoRA contract; "
                "build the bundle again"
            )
