"""Alters sealed files and seals them again, as an attacker would."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coatrt.system.json_data import write_json

__all__ = ["alter_sealed", "seal_text"]


def seal_text(text: str) -> str:
    """Return a text with a valid seal in front, whether the text is JSON or not."""
    rest = text.removeprefix("{").removeprefix("\n")
    return f'{{\n "seal": "{hashlib.sha256(rest.encode("utf-8", "surrogateescape")).hexdigest()}",\n{rest}'


def alter_sealed(path: Path, change: Callable[[Any], Any]) -> None:
    """Change the content of a sealed file in place and seal it again."""
    content = json.loads(path.read_text())
    content.pop("seal")
    change(content)
    write_json(path, content, sealed=True)
