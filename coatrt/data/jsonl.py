"""JSON lines: one object per line, with its file and line number."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from coatrt.data.documents import read_files
from coatrt.errors import ConfigError
from coatrt.system.json_data import parse_json

__all__ = ["Line", "read_lines", "split"]

T = TypeVar("T")


@dataclass(frozen=True)
class Line:
    """One object of a JSONL file.

    Args:
        where: file and line number, for messages.
        value: the object.
    """

    where: str
    value: Mapping[str, Any]

    def text(self, key: str, value: Any) -> str:
        """Return `value` if it is a text and not empty.

        Raises:
            ConfigError: it is not a text, or empty.
        """
        if not isinstance(value, str) or not value:
            quote = f"a {type(value).__name__}" if isinstance(value, list | dict) else json.dumps(value)[:60]
            raise ConfigError(f"{self.where}: {key} must be a text and not empty, got {quote}")
        return value

    def check_keys(self, allowed: Sequence[str], value: Mapping[str, Any] | None = None, what: str = "") -> None:
        """Refuse unknown keys, which would be ignored.

        Args:
            allowed: the known keys.
            value: an object in the line; None: the line itself.
            what: place of `value` in the line, such as " message 2".

        Raises:
            ConfigError: a key is not allowed.
        """
        for key in self.value if value is None else value:
            if key not in allowed:
                raise ConfigError(
                    f"{self.where}{what} has the unknown key {key[:60]!r}; allowed: {', '.join(allowed)}; remove it"
                )


def read_lines(sources: Sequence[str | Path]) -> list[Line]:
    """Return the objects of JSONL files, and of all `*.jsonl` files in directories, ordered by name.

    Blank lines are skipped.

    Raises:
        ConfigError: a source is missing or not UTF-8, a line is not a JSON object, or there is no line.
    """
    lines = [
        _line(f"{path} line {i}", row)
        for path, text in read_files(sources, ".jsonl", "UTF-8 JSONL")
        for i, row in enumerate(text.split("\n"), 1)
        if row.strip()
    ]
    if not lines:
        raise ConfigError(f"no lines in {', '.join(map(str, sources))}; give JSONL files or directories of *.jsonl")
    return lines


def _line(where: str, text: str) -> Line:
    value = parse_json(text, where, "give one JSON object per line")
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is a {type(value).__name__}; give one JSON object per line")
    return Line(where, value)


def split(items: Sequence[T]) -> tuple[list[T], list[T]]:
    """Return (training items, held-out items): every tenth item is held out, or only the last of fewer than ten.

    Args:
        items: all items in the order of the file.
    """
    if len(items) >= 10:
        return [item for i, item in enumerate(items) if i % 10], list(items[::10])
    return list(items[:-1]), list(items[-1:])
