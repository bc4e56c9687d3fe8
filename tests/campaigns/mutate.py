"""Mutations that know what they mutate: JSON by its structure, tensor files by their headers, all else by bytes."""

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

__all__ = ["mutate"]

_RAW = {  # what no Python value is written as
    "@nan": "NaN", "@infinity": "-Infinity", "@huge": "1" + "0" * 400, "@float": "1e999", "@tiny": "1e-400",
    "@deep": "[" * 2000 + "]" * 2000, "@deeper": '{"a":' * 100000 + "1" + "}" * 100000, "@open": "[" * 100000,
    "@surrogate": '"\\ud83d"', "@escape": '"\\x"', "@control": '"\x01"', "@comment": "1 // no", "@bare": "yes",
}  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, -(2**63), -(2**65), 0.5,
    -0.0, 1e300, 1e-300,
    "", " ", "a", "\x00", "../../x", "/etc/passwd", "a\nb", "é😀", "nan", "1", "x" * 10000, "{{ 1/0 }}",
    "(a+)+$", "int5", "int8", [], {}, [None], [[]], [1, 2, 3], [-1] * 1000, {"": None}, {"a": {"a": {}}},
    [True, "a", {}], *_RAW,
)  # fmt: skip


def _places(value: Any, found: list[tuple[Any, Any]] | None = None) -> list[tuple[Any, Any]]:
    """Return (container, key) of everything inside a JSON value."""
    found = [] if found is None else found
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            found.append((value, key))
            _places(value[key], found)
    return found


def _pick(rng: random.Random, value: Any) -> tuple[Any, Any] | None:
    """Return a place; a level is drawn first, so that long lists deep inside do not take all."""
    place, here = None, value
    while isinstance(here, dict | list) and len(here):
        key = rng.choice(list(here)) if isinstance(here, dict) else rng.randrange(len(here))
        place, here = (here, key), here[key]
        if rng.random() < 0.35:
            break
    return place


def _structure(rng: random.Random, value: Any) -> Any:
    """Return a JSON value with one thing changed."""
    place = _pick(rng, value)
    if place is None or rng.random() < 0.03:
        return copy.deepcopy(rng.choice(_VALUES))
    holder, key = place
    kind = rng.randrange(7)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice((key.upper(), key + "x", key[:-1], "", "__class__", "é"))] = holder.pop(key)
    elif kind == 2 and isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), holder[key])
    elif kind == 3:
        other, name = rng.choice(_places(value))
        holder[key] = json.loads(json.dumps(other[name]))
    elif kind == 4 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        number = holder[key]
        holder[key] = rng.choice(
            (-number, number + 1, number - 1, number * 2, number * 1000, number / 3, str(number), [number])
        )
    elif kind == 5 and isinstance(holder[key], str):
        text = holder[key]
        holder[key] = rng.choice((text + " ", text[:-1], text[::-1], text.upper(), text * 100, [text], "\ud800" + text))
    else:
        holder[key] = copy.deepcopy(rng.choice(_VALUES))
    return value


def _dump(value: Any) -> bytes:
    text = json.dumps(value)
    for name, raw in _RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text.encode()


def _bytes(rng: random.Random, data: bytes) -> bytes:
    """Return bytes with some changed."""
    at, made = rng.randrange(len(data) + 1), bytearray(data)
    kind = rng.randrange(8)
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        for _ in range(rng.choice((1, 1, 8))):
            if made:
                made[rng.randrange(len(made))] ^= 1 << rng.randrange(8)
        return bytes(made)
    if kind == 2:
        made[at:at] = rng.choice((b"\xff", b"\xc3(", b"\x00", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xf5", b'"', b"}"))
        return bytes(made)
    if kind == 3:
        return rng.choice((b"", b" ", b"null", b"\x00" * 100, b"[]", b"{}", b"\xef\xbb\xbf" + data, data + data))
    if kind == 4:
        end = min(len(data), at + rng.choice((1, 4, 100)))
        return bytes(data[:at] + data[end:])
    if kind == 5:
        return bytes(data[:at] + data[at // 2 : at] + data[at:])
    if kind == 6:
        return data.decode("latin-1").encode("utf-16")
    made[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**62, 2**64 - 1)))
    return bytes(made)


def _json(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.2:
        return _bytes(rng, data)
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = _structure(rng, value)
    text = _dump(value)
    if rng.random() < 0.05 and text.startswith(b"{"):
        text = b'{"format": 99, ' + text[1:]  # the key twice
    return text


def _lines(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.2:
        return _bytes(rng, data)
    lines = data.rstrip(b"\n").split(b"\n")
    i = rng.randrange(len(lines))
    lines[i] = _json(rng, lines[i])
    return b"\n".join(lines)


def _tensors(rng: random.Random, data: bytes) -> bytes:
    """Change a safetensors file: its header, what says how long that is, or bytes anywhere."""
    if rng.random() < 0.3:
        return _bytes(rng, data)
    length = int(struct.unpack("<Q", data[:8])[0])
    header = _json(rng, data[8 : 8 + length])
    said = len(header) if rng.random() < 0.9 else rng.choice((0, 1, length + 1, 2**40, 2**64 - 1))
    return struct.pack("<Q", said) + header + data[8 + length :]


def _gguf(rng: random.Random, data: bytes) -> bytes:
    """Change the first part of a GGUF file, where its keys and tensors are described."""
    head = min(len(data), 3000)
    return _bytes(rng, data[:head]) + data[head:]


_BY_SUFFIX: dict[str, Callable[[random.Random, bytes], bytes]] = {
    ".json": _json, ".jsonl": _lines, ".safetensors": _tensors, ".gguf": _gguf, ".txt": _bytes,
}  # fmt: skip


def mutate(rng: random.Random, data: bytes, suffix: str) -> bytes:
    """Return the content of a file of a suffix such as ".json" with something changed."""
    return _BY_SUFFIX[suffix](rng, data)
