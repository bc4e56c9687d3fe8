"""JSON lines: one object a line, each knowing the file and line it came from."""

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
        """Return `value` if it is a text with something in it.

        Raises:
            ConfigError: it is not.
        """
        if not isinstance(value, str) or not value:
            shown = f"a {type(value).__name__}" if isinstance(value, list | dict) else json.dumps(value)[:60]
            raise ConfigError(f"{self.where}: {key} is {shown}; give a text that is not empty")
        return value

    def check_keys(self, allowed: Sequence[str], value: Mapping[str, Any] | None = None, what: str = "") -> None:
        """Refuse keys that mean nothing here, rather than leave out what they say.

        Args:
            allowed: the keys that mean something.
            value: an object inside the line; None: the line itself.
            what: where in the line that is, such as " message 2".

        Raises:
            ConfigError: there is another key.
        """
        for key in self.value if value is None else value:
            if key not in allowed:
                raise ConfigError(
                    f"{self.where}{what} has the unknown key {key[:60]!r}; allowed: {', '.join(allowed)}; remove it"
                )


def read_lines(sources: Sequence[str | Path]) -> list[Line]:
    """Return the objects of JSONL files, and of all `*.jsonl` files of directories in the order of their names.

    Blank lines are skipped.

    Raises:
        ConfigError: a source is missing, no UTF-8 text, a line is no JSON object, or there is none at all.
    """
    lines = [
        _line(f"{path} line {i}", row)
        for path, text in read_files(sources, ".jsonl", "UTF-8 JSONL")
        for i, row in enumerate(text.split("\n"), 1)
        if row.strip()
    ]
    if not lines:
        raise ConfigError(f"no line in {', '.join(map(str, sources))}; give JSONL files or directories of *.jsonl")
    return lines


def _line(where: str, text: str) -> Line:
    value = parse_json(text, where, "give one JSON object a line")
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is a {type(value).__name__}; give one JSON object a line")
    return Line(where, value)


def split(items: Sequence[T]) -> tuple[list[T], list[T]]:
    """Return (to train on, held out): every tenth item is held out, or the last one where there are fewer than ten.

    Args:
        items: in the order of the file.
    """
    if len(items) >= 10:
        return [item for i, item in enumerate(items) if i % 10], list(items[::10])
    return list(items[:-1]), list(items[-1:])
