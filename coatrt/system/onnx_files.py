"""Inputs, outputs and external data of an ONNX file, read without loading any weight."""

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
        external: external data file, as the graph names it (relative to its directory) → bytes of it that are read.
        inputs: name → shape; a dynamic dimension is its name or None.
        outputs: name → shape, likewise.
    """

    external: Mapping[str, int]
    inputs: Mapping[str, tuple[int | str | None, ...]]
    outputs: Mapping[str, tuple[int | str | None, ...]]


def read_onnx(graph: Path) -> OnnxFile:
    """Return inputs, outputs and external data of an ONNX file.

    Subgraphs, functions and attributes are searched too: a runtime follows every external name.

    Raises:
        BundleError: it is not an ONNX file, or lacks nodes, outputs or a version: protobuf parses an empty or truncated
            file as a message with fewer fields.
    """
    import onnx
    from google.protobuf.message import DecodeError, Message

    try:
        model = onnx.load(graph, load_external_data=False)
    except (DecodeError, ValueError, RecursionError) as error:
        raise BundleError(f"not an ONNX graph: {graph} ({reason(error)}); build the bundle again") from None
    parts = {
        "content": graph.stat().st_size,
        "IR version": model.ir_version,
        "operator set": len(model.opset_import),
        "nodes": len(model.graph.node),
        "outputs": len(model.graph.output),
    }
    if missing := next((name for name, present in parts.items() if not present), ""):
        raise BundleError(f"not a complete ONNX graph: {graph} (no {missing}); build the bundle again")
    external: dict[str, int] = {}
    queue: list[Message] = [model]
    while queue:
        message = queue.pop()
        if isinstance(message, onnx.TensorProto):  # going on would copy its bytes
            entries = {entry.key: entry.value for entry in message.external_data}
            for location in (entry.value for entry in message.external_data if entry.key == "location"):
                external[location] = max(external.get(location, 0), _end(entries))
            continue
        for field, value in message.ListFields():
            if field.message_type is not None:
                queue += [value] if isinstance(value, Message) else value
    return OnnxFile(external, _shapes(model.graph.input), _shapes(model.graph.output))


def _end(entries: Mapping[str, str]) -> int:
    """Return the end offset in bytes of an external tensor; 0 where the graph names none."""
    numbers = [entries.get(key, "0") for key in ("offset", "length")]
    return sum(int(number) for number in numbers if number.isascii() and number.isdigit() and len(number) < 20)


def _shapes(values: Any) -> dict[str, tuple[int | str | None, ...]]:
    return {
        value.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
            for dim in value.type.tensor_type.shape.dim
        )
        for value in values
    }
