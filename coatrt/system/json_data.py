"""JSON files: written atomically, read strictly into the types they hold; what is wrong is one line.

A sealed file's first key, "seal", is the SHA-256 of all bytes behind that line: whatever is altered shows before
anything is parsed. It guards against accident; against an enemy, who can seal as well, a bundle's signature does.
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
    """Return what a JSON text says; `where` names it in the message.

    Raises:
        CoatError: it is not JSON in UTF-8, or an object in it has a key twice: which of the two counts is not said.
    """
    text = decode(data, where, error) if isinstance(data, bytes) else data
    if text.startswith(MARK):
        raise error(f"{where} begins with a byte order mark (U+FEFF) where no file begins; remove that character")

    def unique(pairs: list[tuple[str, Any]]) -> None:
        if len(dict(pairs)) < len(pairs):
            key = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise error(f"{where} has the key {key[:60]!r} twice in one object; remove one of them")

    try:
        value = msgspec.json.decode(text)
        json.loads(text, object_pairs_hook=unique, parse_int=str, parse_float=str)  # msgspec takes the last one
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
        kind: its type, see `convert`; `object` for any JSON.
        what: what the file is, for the message ("configuration", "bundle manifest").
        remedy: what to do where it is garbled ("train the adapter again").
        error: what to raise; None: see `convert`.
        version: what its key "format" must be; None: it has none.
        sealed: it was written with a seal, which is checked first.
        check: called with the content before it is parsed.

    Raises:
        CoatError: the file is missing, altered, not JSON, or of another version or structure.
    """
    path, raised = Path(path), error or ConfigError
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise raised(f"{what} {path} does not exist; give the path of an existing file") from None
    except OSError as problem:
        raise raised(f"{what} {path} cannot be read: {problem.strerror}; give the path of a readable file") from None
    if sealed:
        seal = _SEAL.match(data)
        if seal is None:
            raise raised(f"{what} {path} has no seal: it was altered, or another coatrt wrote it; {remedy}")
        if hashlib.sha256(data[seal.end() :]).hexdigest() != seal[1].decode():
            raise raised(f"{what} {path} was altered or is damaged; {remedy}")
    if check is not None:
        check(data)
    value = parse_json(data, f"{what} {path}", remedy, raised)
    if sealed:
        del value["seal"]
    try:
        msgspec.msgpack.encode(value)  # refuses integers beyond 64 bits, which would overflow where they meet floats
    except (OverflowError, RecursionError) as problem:
        raise raised(f"{what} {path} is garbled ({problem}); {remedy}") from None
    if version is not None and (not isinstance(value, dict) or value.get("format") != version):
        given = value.get("format") if isinstance(value, dict) else None
        raise raised(f"{what} {path} has format {given}, coatrt {__version__} reads {version}; {remedy}")
    return convert(value, kind, f"{what} {path}", remedy, error)


def convert(
    value: Any, kind: type[T], where: str, remedy: str, error: type[CoatError] | None = None, *, exact: bool = False
) -> T:
    """Return JSON data as a dataclass, TypedDict or container of these; types are strict, missing keys are refused.

    Args:
        value: the data.
        kind: the type.
        where: what the data are, and of which file, for the message.
        remedy: what to do where they are garbled.
        error: what to raise; None: ConfigError, and what the type's own checks raise.
        exact: refuse keys that are no field of the dataclass `kind`, and require all that are: defaults stand for none.

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
        raise (error or type(problem))(f"{where}: {problem}") from None


def _encode(value: object) -> bytes:
    # The hook is asked about what JSON has no form for: numpy's floats.
    return msgspec.json.encode(value, enc_hook=float)


def to_data(value: object) -> Any:
    """Return what a JSON file of a value holds, dataclasses as objects and tuples as lists."""
    return msgspec.json.decode(_encode(value))


def dump_json(value: object) -> str:
    """Return a value as indented JSON."""
    return msgspec.json.format(_encode(value), indent=1).decode()


def write_json(path: str | Path, value: object, *, sealed: bool = False) -> None:
    """Write a value to `path` as indented JSON, atomically.

    Args:
        path: the file.
        value: the value, an object where it is sealed.
        sealed: with the hash of all the rest in front, see `read_as`.
    """
    text = dump_json(value) + "\n"
    if sealed:
        rest = text.removeprefix("{\n")
        text = f'{{\n "seal": "{hashlib.sha256(rest.encode()).hexdigest()}",\n{rest}'
    write_text(path, text)
