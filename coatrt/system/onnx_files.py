"""What an ONNX file says it is made of, read without loading any weight."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coatrt.errors import BundleError, reason

__all__ = ["OnnxFile", "read_onnx"]


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file.

    Args:
        external: the files that its tensors lie in, as it names them (relative to its own place), and the bytes of each
            that it reads.
        inputs: name → shape, a text or None where a dimension is open.
        outputs: the same.
    """

    external: Mapping[str, int]
    inputs: Mapping[str, tuple[int | str | None, ...]]
    outputs: Mapping[str, tuple[int | str | None, ...]]


def read_onnx(graph: Path) -> OnnxFile:
    """Return what an ONNX file says of itself.

    All of it is walked, subgraphs, functions and attributes too: a runtime follows every external name.

    Raises:
        BundleError: it is no ONNX file, or has no graph with nodes, outputs and a version: protobuf takes an empty or
            cut file for a message that says less.
    """
    import onnx
    from google.protobuf.message import DecodeError, Message

    try:
        model = onnx.load(graph, load_external_data=False)
    except (DecodeError, ValueError, RecursionError) as error:
        raise BundleError(f"{graph} is no ONNX graph ({reason(error)}); build the bundle again") from None
    parts = {
        "content": graph.stat().st_size,
        "IR version": model.ir_version,
        "operator set": len(model.opset_import),
        "nodes": len(model.graph.node),
        "outputs": len(model.graph.output),
    }
    if missing := next((name for name, there in parts.items() if not there), ""):
        raise BundleError(f"{graph} is no whole ONNX graph, it has no {missing}; build the bundle again")
    external: dict[str, int] = {}
    left: list[Message] = [model]
    while left:
        message = left.pop()
        if isinstance(message, onnx.TensorProto):  # whose bytes would be copied below
            facts = {entry.key: entry.value for entry in message.external_data}
            for location in (entry.value for entry in message.external_data if entry.key == "location"):
                external[location] = max(external.get(location, 0), _end(facts))
            continue
        for field, value in message.ListFields():
            if field.message_type is not None:
                left += [value] if isinstance(value, Message) else value
    return OnnxFile(external, _shapes(model.graph.input), _shapes(model.graph.output))


def _end(facts: Mapping[str, str]) -> int:
    """Return where the bytes of an external tensor end; 0 where the graph does not say."""
    numbers = [facts.get(key, "0") for key in ("offset", "length")]
    return sum(int(number) for number in numbers if number.isascii() and number.isdigit() and len(number) < 20)


def _shapes(values: Any) -> dict[str, tuple[int | str | None, ...]]:
    return {
        value.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
            for dim in value.type.tensor_type.shape.dim
        )
        for value in values
    }
