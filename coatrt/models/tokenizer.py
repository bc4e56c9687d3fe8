"""The tokenizer of a model or bundle, as transformers reads it; code beside it never runs, a wrong file is named."""

import tempfile
from pathlib import Path
from typing import Any

from coatrt.errors import CheckpointError, CoatError, reason
from coatrt.models.transformers_config import quiet_transformers
from coatrt.system.json_data import parse_json
from coatrt.system.utf8 import decode

__all__ = ["load_tokenizer"]

_WHOLE = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
"""Files that hold the vocabulary; a tokenizer has one of them at least."""
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")
_TEXTS = ("chat_template.jinja", "merges.txt", "vocab.txt")
_AGAIN = "fetch it again"


def load_tokenizer(directory: str | Path) -> Any:
    """Return the transformers tokenizer saved in a directory.

    Raises:
        CheckpointError: there is none, transformers cannot read it, or it wants to run code of its own; the file at
            fault is named.
    """
    quiet_transformers()
    directory = Path(directory)
    none = f"{directory} holds no tokenizer that transformers can read"
    try:
        _check(directory)
        return _load(directory)
    except CoatError as error:
        raise CheckpointError(f"{none}: {error}") from None
    except Exception as error:  # tokenizers raises plain ones
        if not isinstance(error, ImportError) and "trust_remote_code" in str(error):
            raise CheckpointError(
                f"the tokenizer in {directory} wants to run Python code of its own, which coatrt never does; save a "
                "plain one beside the model, or update transformers"
            ) from None
        name, said = _at_fault(directory, error)
        where = f": {directory / name}" if name else ""
        raise CheckpointError(
            f"{none}{where} ({said}); save a plain one beside the model, or update transformers"
        ) from None


def _load(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)


def _check(directory: Path) -> None:
    """Refuse settings that are no JSON object and templates that are no plain UTF-8, before transformers reads them.

    It takes the last of two equal keys, and a byte order mark for a part of the template.
    """
    for name in _SETTINGS:
        if (path := directory / name).exists():
            value = parse_json(_text(path), str(path), _AGAIN, CheckpointError)
            if not isinstance(value, dict):
                raise CheckpointError(f"{path} is a {type(value).__name__}, not an object; {_AGAIN}")
    for path in (*map(directory.joinpath, _TEXTS), *sorted(directory.glob("additional_chat_templates/*.jinja"))):
        if path.exists():
            _text(path)


def _text(path: Path) -> str:
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


def _at_fault(directory: Path, error: Exception) -> tuple[str, str]:
    """Return which file transformers failed at, empty where none is to blame alone, and what is wrong with it."""
    there = [path.name for path in sorted(directory.iterdir()) if path.is_file()] if directory.is_dir() else []
    if not any(name in there for name in _WHOLE):
        return "", f"no file {', '.join(_WHOLE)}"
    for name in _WHOLE:
        if name in there and (said := _damage(directory / name)):
            return name, said
    for name in (*_SETTINGS, *_TEXTS, "config.json"):
        if name in there and _loads(directory, [other for other in there if other != name]):
            return name, reason(error)
    return "", reason(error)


def _damage(path: Path) -> str:
    """Return what is wrong with a file of the vocabulary by itself; empty where nothing is."""
    try:
        if path.suffix == ".json" and not isinstance(parse_json(path.read_bytes(), "it", _AGAIN), dict):
            return "it is no object"
        if path.name == "tokenizer.json":
            from tokenizers import Tokenizer

            Tokenizer.from_file(str(path))
        return "" if path.stat().st_size else "it is empty"
    except Exception as error:
        return reason(error)


def _loads(directory: Path, names: list[str]) -> bool:
    """Return whether transformers reads the tokenizer where only these of its files are there."""
    with tempfile.TemporaryDirectory(prefix="coatrt-tokenizer-") as part:
        for name in names:
            (Path(part) / name).symlink_to((directory / name).absolute())
        try:
            _load(Path(part))
        except Exception:
            return False
        return True
