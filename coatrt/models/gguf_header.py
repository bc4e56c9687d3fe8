"""The header of a GGUF file: its architecture from the first kilobyte, and whether its counts fit the file.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, little-endian.
"""

import struct
from pathlib import Path

__all__ = ["architecture", "check_header"]

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value by type
_STRING, _ARRAY = 8, 9
_FIRST = 1024  # bytes


def architecture(path: Path) -> str:
    """Return `general.architecture`, which writers put first; "" if it is not in the first kilobyte."""
    with path.open("rb") as stream:
        start = stream.read(_FIRST)
    key = b"general.architecture" + struct.pack("<I", _STRING)
    at = start.find(key) + len(key)
    if start[:4] != b"GGUF" or key not in start or at + 8 > len(start):
        return ""
    length = int.from_bytes(start[at : at + 8], "little")
    return start[at + 8 : at + 8 + length].decode(errors="replace") if length <= _FIRST - at - 8 else ""


def check_header(path: Path) -> None:
    """Refuse a header whose counts and lengths exceed the file: the reader would run on endlessly.

    Raises:
        ValueError: they do.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:

        def number(form: str) -> int:
            data = stream.read(struct.calcsize(form))
            return int(struct.unpack(form, data)[0])

        def skip(length: int) -> None:
            if length > size - stream.tell():
                raise ValueError(f"{length} bytes announced, {size - stream.tell()} left")
            stream.seek(length, 1)

        def value(kind: int) -> None:
            if kind == _STRING:
                skip(number("<Q"))
            elif kind == _ARRAY:
                inner, count = number("<I"), number("<Q")
                if inner in _SIZES:
                    skip(_SIZES[inner] * count)
                elif inner == _STRING and count <= (size - stream.tell()) // 8:
                    for _ in range(count):
                        skip(number("<Q"))
                else:
                    raise ValueError(f"an array of {count} values of type {inner}")
            else:
                skip(_SIZES[kind])

        if stream.read(4) != b"GGUF" or number("<I") not in (2, 3):
            raise ValueError("not GGUF version 2 or 3")
        tensors, keys = number("<Q"), number("<Q")
        if max(tensors, keys) > size // 12:
            raise ValueError(f"{tensors} tensors and {keys} keys in {size} bytes")
        for _ in range(keys):
            skip(number("<Q"))
            value(number("<I"))
        for _ in range(tensors):
            skip(number("<Q"))
            dimensions = number("<I")
            if dimensions > 4:
                raise ValueError(f"a tensor of {dimensions} dimensions")
            skip(8 * dimensions + 4 + 8)
