"""The tokenizer of a model, as transformers reads it; code beside it never runs, a wrong file is named."""

import tempfile
from pathlib import Path
from typing import Any

from coatrt.errors import CheckpointError, CoatError, reason
from coatrt.models.tokenizer_files import SETTINGS, TEXTS, check_files
from coatrt.models.transformers_config import quiet_transformers
from coatrt.system.extras import require
from coatrt.system.json_data import parse_json

__all__ = ["load_tokenizer"]

_WHOLE = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
"""Files that hold the vocabulary; a tokenizer has one of them at least."""
_AGAIN = "fetch it again"


def load_tokenizer(directory: str | Path) -> Any:
    """Return the transformers tokenizer saved in a directory.

    A bundle's own is read by `Bundle.tokenizer`, without transformers.

    Raises:
        ExtraError: transformers is missing.
        CheckpointError: there is none, transformers cannot read it, or it wants to run code of its own; the file at
            fault is named.
    """
    require(f"the tokenizer of {directory}", "train")
    quiet_transformers()
    directory = Path(directory)
    none = f"{directory} holds no tokenizer that transformers can read"
    try:
        check_files(directory)
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


def _at_fault(directory: Path, error: Exception) -> tuple[str, str]:
    """Return which file transformers failed at, empty where none is to blame alone, and what is wrong with it."""
    there = [path.name for path in sorted(directory.iterdir()) if path.is_file()] if directory.is_dir() else []
    if not any(name in there for name in _WHOLE):
        return "", f"no file {', '.join(_WHOLE)}"
    for name in _WHOLE:
        if name in there and (said := _damage(directory / name)):
            return name, said
    for name in (*SETTINGS, *TEXTS, "config.json"):
        if name in there and _loads(directory, [other for other in there if other != name]):
            return name, reason(error)
    return "", reason(error)


def _damage(path: Path) -> str:
    """Return what is wrong with a file of the vocabulary by itself; empty where nothing is."""
    try:
        if path.suffix == ".json" and not isinstance(parse_json(path.read_bytes(), "it", _AGAIN), dict):
            return "it is not a JSON object"
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
