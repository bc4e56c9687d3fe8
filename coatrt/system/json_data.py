"""JSON files: written atomically, read strictly into typed values, with one-line errors.

The first key of a sealed file, "seal", is the SHA-256 of all bytes after that line, checked before anything is parsed.
It detects accidents; an attacker can recompute it, so a bundle may also be signed.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from coatrt import __version__
from coatrt.errors import CoatError, ConfigError
from coatrt.system.files import write_text
from coatrt.system.utf8 import MARK, decode

__all__ = ["convert", "dump_json", "parse_json", "read_as", "to_data", "write_json"]

T = TypeVar("T")

_SEAL = re.compile(rb'\{\n "seal": "([0-9a-f]{64})",\n')


def parse_json(data: bytes | str, where: str, remedy: str, error: type[CoatError] = ConfigError) -> Any:
    """Return the value of a JSON text; `where` names it in the message.

    Raises:
        CoatError: it is not JSON in UTF-8, or an object in it has a key twice, which JSON leaves undefined.
    """
    text = decode(data, where, error) if isinstance(data, bytes) else data
    if text.startswith(MARK):
        raise error(f"{where} begins with a byte order mark (U+FEFF) that is not at the start of its file; remove it")

    def unique(pairs: list[tuple[str, Any]]) -> None:
        if len(dict(pairs)) < len(pairs):
            key = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise error(f"{where} has the key {key[:60]!r} twice in one object; remove one of them")

    try:
        value = msgspec.json.decode(text)
        json.loads(text, object_pairs_hook=unique, parse_int=str, parse_float=str)  # msgspec keeps the last duplicate
    except (UnicodeError, msgspec.DecodeError, ValueError, RecursionError) as problem:
        raise error(f"{where} is not JSON ({problem}); {remedy}") from None
    return value


def read_as(
    path: str | Path,
    kind: type[T],
    what: str,
    remedy: str,
    error: type[CoatError] | None = None,
    *,
    version: int | None = None,
    sealed: bool = False,
    check: Callable[[bytes], None] | None = None,
) -> T:
    """Return the value in a JSON file.

    Args:
        path: the file.
        kind: type of the value, see `convert`; `object` for any JSON.
        what: kind of file, for the message ("configuration", "bundle manifest").
        remedy: what to do if it is garbled ("train the adapter again").
        error: class to raise; None: see `convert`.
        version: required value of its key "format"; None: not checked.
        sealed: whether it has a seal, which is checked first.
        check: called with the content before it is parsed.

    Raises:
        CoatError: the file is missing, altered, not JSON, or of another version or structure.
    """
    path, error_class = Path(path), error or ConfigError
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise error_class(f"{what} {path} does not exist; give the path of an existing file") from None
    except OSError as problem:
        raise error_class(
            f"{what} {path} cannot be read: {problem.strerror}; give the path of a readable file"
        ) from None
    if sealed:
        seal = _SEAL.match(data)
        if seal is None:
            raise error_class(f"{what} {path} has no seal: it was altered, or another coatrt wrote it; {remedy}")
        if hashlib.sha256(data[seal.end() :]).hexdigest() != seal[1].decode():
            raise error_class(f"{what} {path} was altered or is damaged; {remedy}")
    if check is not None:
        check(data)
    value = parse_json(data, f"{what} {path}", remedy, error_class)
    if sealed:
        del value["seal"]
    try:
        msgspec.msgpack.encode(value)  # refuses integers beyond 64 bits, which would overflow in float arithmetic
    except (OverflowError, RecursionError) as problem:
        raise error_class(f"{what} {path} is garbled ({problem}); {remedy}") from None
    if version is not None and (not isinstance(value, dict) or value.get("format") != version):
        actual = value.get("format") if isinstance(value, dict) else None
        raise error_class(f"{what} {path} has format {actual}, coatrt {__version__} reads {version}; {remedy}")
    return convert(value, kind, f"{what} {path}", remedy, error)


def convert(
    value: Any, kind: type[T], where: str, remedy: str, error: type[CoatError] | None = None, *, exact: bool = False
) -> T:
    """Return JSON data as a dataclass, TypedDict or container of these; wrong types and missing keys are refused.

    Args:
        value: the data.
        kind: the type.
        where: kind of data and its file, for the message.
        remedy: what to do if they are garbled.
        error: class to raise; None: ConfigError, or the class that the type's own checks raise.
        exact: refuse keys that are not fields of the dataclass `kind`, and require every field, defaults or not.

    Raises:
        CoatError: the data are of another structure, or the type refuses them.
    """
    if exact and isinstance(value, dict):
        names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
        unknown = next((name for name in value if name not in names), None)
        if unknown is not None:
            nearest = difflib.get_close_matches(unknown, names, 1, 0)[0]
            raise (error or ConfigError)(f"{where} has the unknown key {unknown!r}; did you mean {nearest!r}?")
        if missing := ", ".join(name for name in names if name not in value):
            raise (error or ConfigError)(f"{where} is garbled (it lacks {missing}); {remedy}")
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as problem:
        raise (error or ConfigError)(f"{where} is garbled ({problem}); {remedy}") from None
    except CoatError as problem:
        advice = "" if "; " in str(problem) else f"; {remedy}"
        raise (error or type(problem))(f"{where}: {problem}{advice}") from None


def _encode(value: object) -> bytes:
    # The hook converts values without a JSON form: numpy's floats.
    return msgspec.json.encode(value, enc_hook=float)


def to_data(value: object) -> Any:
    """Return a value as JSON data: dataclasses as dictionaries, tuples as lists."""
    return msgspec.json.decode(_encode(value))


def dump_json(value: object) -> str:
    """Return a value as indented JSON."""
    return msgspec.json.format(_encode(value), indent=1).decode()


def write_json(path: str | Path, value: object, *, sealed: bool = False) -> None:
    """Write a value to `path` as indented JSON, atomically.

    Args:
        path: the file.
        value: the value; an object if sealed.
        sealed: whether to put the hash of the rest in front, see `read_as`.
    """
    text = dump_json(value) + "\n"
    if sealed:
        rest = text.removeprefix("{\n")
        text = f'{{\n "seal": "{hashlib.sha256(rest.encode()).hexdigest()}",\n{rest}'
    write_text(path, text)
