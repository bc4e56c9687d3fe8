"""What an ONNX file says it is made of, read without loading any weight."""

from pathlib import Path

from coatrt.errors import BundleError

__all__ = ["external_locations"]


def external_locations(graph: Path) -> set[str]:
    """Return the files that the tensors of a graph lie in, as the graph names them: relative to its own place.

    All of it is walked, subgraphs, functions and attributes too: a runtime follows every one of these names.

    Raises:
        BundleError: it is no ONNX file.
    """
    import onnx
    from google.protobuf.message import DecodeError, Message

    try:
        model = onnx.load(graph, load_external_data=False)
    except DecodeError as error:
        raise BundleError(f"{graph} is no ONNX graph ({error}); build the bundle again") from None
    found: set[str] = set()
    left: list[Message] = [model]
    while left:
        message = left.pop()
        if isinstance(message, onnx.TensorProto):  # whose bytes would be copied below
            found |= {entry.value for entry in message.external_data if entry.key == "location"}
            continue
        for field, value in message.ListFields():
            if field.message_type is not None:
                left += [value] if isinstance(value, Message) else value
    return found
