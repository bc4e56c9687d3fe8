"""config.json as it lies on disk: read, and the few keys that matter before `DecoderSpec` interprets the rest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coatrt.errors import CheckpointError, ConfigError
from coatrt.system.json_data import read_as

__all__ = ["architecture", "end_tokens", "model_type", "read_config"]

_VOLATILE_KEYS = {
    "transformers_version",
    "_name_or_path",
    "_model_name_or_path",
    "torch_dtype",
    "dtype",
    "architectures",
}


def read_config(directory: Path) -> dict[str, Any]:
    """Return the content of a model directory's config.json.

    Raises:
        CheckpointError: there is none, it names no model_type, or the model is quantized.
    """
    path = directory / "config.json"
    config = read_as(path, dict[str, Any], "model configuration", "fetch the model again", CheckpointError)
    if not model_type(config):
        raise CheckpointError(f"{path} names no model_type; give a Hugging Face model directory")
    if config.get("quantization_config"):
        raise CheckpointError(f"{directory} is quantized already; give the 16- or 32-bit model it was made from")
    return config


def model_type(config: Mapping[str, Any]) -> str:
    """Return the family a config.json names: llama, qwen3, and so on; empty where it names none."""
    return str(config.get("model_type", ""))


def end_tokens(directory: Path, config: Mapping[str, Any]) -> set[int]:
    """Return every token that ends a text, as a model's config.json and generation_config.json name them.

    Args:
        directory: of the model.
        config: the content of its config.json.

    Raises:
        ConfigError: its generation_config.json cannot be read, or one of them names no token.
    """
    path = directory / "generation_config.json"
    settings = read_as(path, dict[str, Any], "generation settings", "fetch it again") if path.is_file() else {}
    tokens: set[int] = set()
    for file, values in (("config.json", config), (path.name, settings)):
        named = values.get("eos_token_id")
        found = [] if named is None else named if isinstance(named, list) else [named]
        if not all(type(token) is int and 0 <= token < 2**31 for token in found):
            raise ConfigError(f"{directory / file}: eos_token_id must be a token id or a list of them, got {named!r}")
        tokens.update(found)
    return tokens


def architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that say what the model computes, without those that change with who saved it."""
    return {key: value for key, value in config.items() if key not in _VOLATILE_KEYS}
