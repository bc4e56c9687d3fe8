"""Is a graph the decoder that its bundle says: names and shapes of inputs and outputs, and the bytes it reads."""

from pathlib import Path

from coatrt.configs.lora_contract import DecoderIO, LoraContract
from coatrt.errors import BundleError
from coatrt.models.matrices import ModelMatrices
from coatrt.system.onnx_files import read_onnx

__all__ = ["check_graph", "check_matrices"]

_TOKENS = ("input_ids", "position_ids", "write_index", "logits_index")
_CUDA_TOKENS = ("input_ids", "seqlens_k", "total_sequence_length", "logits_rows")


def check_graph(form: str, graph: Path, io: DecoderIO, contract: LoraContract) -> None:
    """Refuse a graph that is not the decoder of `io` and `contract`, without running it.

    Args:
        form: which form of the graph it is.
        graph: an ONNX file, its weights beside it.
        io: its inputs and outputs by the manifest.
        contract: its LoRA inputs.

    Raises:
        BundleError: it is no whole graph, lacks an input or output or has another shape, reads more than its weights
            file has, or breaks a rule of ONNX.
    """
    import onnx

    found = read_onnx(graph)
    cache = (None, io.kv_heads, io.cache_length, io.head_dim)
    inputs: dict[str, tuple[int | None, ...]] = dict.fromkeys(_CUDA_TOKENS if form == "cuda" else _TOKENS, ())
    inputs |= dict.fromkeys(io.past_names, cache) | dict(contract.inputs)
    outputs: dict[str, tuple[int | None, ...]] = {"logits": (None, None, io.vocabulary)}
    outputs |= dict.fromkeys(io.present_names, cache)
    for what, named, there in (("input", inputs, found.inputs), ("output", outputs, found.outputs)):
        for name, shape in named.items():
            if name not in there:
                raise BundleError(f"{graph} has no {what} {name}, which its bundle names; build the bundle again")
            other = there[name]
            fixed = [(size, own) for size, own in zip(shape, other, strict=False) if size is not None]
            if shape and other and (len(shape) != len(other) or any(size != own for size, own in fixed)):
                shown = tuple("any" if size is None else size for size in shape)
                raise BundleError(
                    f"{graph} has the {what} {name} as {other}, its bundle says {shown}; build the bundle again"
                )
    for location, size in found.external.items():
        have = (graph.parent / location).stat().st_size
        if size > have:
            raise BundleError(f"{graph} reads {size} bytes of {location}, which has {have}; build the bundle again")
    try:
        onnx.checker.check_model(str(graph))
    except Exception as error:  # ValidationError shares no public base with what reading raises
        said = " ".join(str(error).split())[:300]
        raise BundleError(f"{graph} is no valid ONNX graph ({said}); build the bundle again") from None


def check_matrices(directory: Path, model: ModelMatrices, io: DecoderIO, contract: LoraContract) -> None:
    """Refuse matrices of a manifest whose sizes are not those of its decoder and its LoRA contract.

    Args:
        directory: of the bundle, for messages.
        model: the matrices.
        io: of a graph that `check_graph` has checked.
        contract: the LoRA contract.

    Raises:
        BundleError: one has another size.
    """
    for matrix in model.matrices:
        pair = contract.by_matrix.get(matrix.name)
        told = (matrix.N, matrix.K) if not matrix.is_table else (matrix.N,)
        held = (pair.N, pair.K) if pair is not None else (io.vocabulary,) if matrix.is_table else ()
        if told != held:
            raise BundleError(
                f"{directory}: the manifest gives {matrix.name} the size {told}, decoder and LoRA contract {held}; "
                "build the bundle again"
            )
