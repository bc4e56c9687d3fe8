"""The files of a saved tokenizer, checked before a library reads them."""

from pathlib import Path
from typing import Any

from coatrt.errors import CheckpointError
from coatrt.system.json_data import parse_json
from coatrt.system.utf8 import decode

__all__ = ["SETTINGS", "TEXTS", "check_files", "extra_templates", "read_json", "read_text"]

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")
TEXTS = ("chat_template.jinja", "merges.txt", "vocab.txt")
_AGAIN = "fetch it again"


def check_files(directory: Path) -> None:
    """Refuse settings that are not a JSON object and templates that are not plain UTF-8.

    transformers takes the last of two equal keys, and a byte order mark for a part of the template.

    Raises:
        CheckpointError: so it is; the file is named.
    """
    for path in map(directory.joinpath, SETTINGS):
        if path.exists():
            read_json(path)
    for path in (*map(directory.joinpath, TEXTS), *extra_templates(directory)):
        if path.exists():
            read_text(path)


def extra_templates(directory: Path) -> list[Path]:
    """Return the files of chat templates that are not the default one; each is named by its stem."""
    return sorted(directory.glob("additional_chat_templates/*.jinja"))


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    value = parse_json(read_text(path), str(path), _AGAIN, CheckpointError)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is a {type(value).__name__}, not an object; {_AGAIN}")
    return value


def read_text(path: Path) -> str:
    """Return the text in a file.

    Raises:
        CheckpointError: it cannot be read, or is not UTF-8 without a byte order mark.
    """
    try:
        data = path.read_bytes()
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read: {problem.strerror}; {_AGAIN}") from None
    text = decode(data, str(path), CheckpointError)
    if len(text.encode()) < len(data):
        raise CheckpointError(
            f"{path} begins with a byte order mark (U+FEFF), which counts as text there; save it without"
        )
    return text
