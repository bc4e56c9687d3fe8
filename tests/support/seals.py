"""Altered files with a seal that holds, as someone would write them who alters more than by accident."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coatrt.system.json_data import write_json

__all__ = ["alter_sealed", "seal_text"]


def seal_text(text: str) -> str:
    """Return a text with a seal in front, whether that gives JSON or not."""
    rest = text.removeprefix("{").removeprefix("\n")
    return f'{{\n "seal": "{hashlib.sha256(rest.encode("utf-8", "surrogateescape")).hexdigest()}",\n{rest}'


def alter_sealed(path: Path, change: Callable[[Any], Any]) -> None:
    """Change the content of a sealed file in place and seal it again."""
    whole = json.loads(path.read_text())
    whole.pop("seal")
    change(whole)
    write_json(path, whole, sealed=True)
