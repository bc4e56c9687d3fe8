"""config.json as stored: reading it, and the few keys used before `DecoderSpec` interprets the rest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coatrt.errors import CheckpointError, ConfigError
from coatrt.system.json_data import read_as

__all__ = ["architecture", "end_tokens", "model_type", "read_config", "read_raw_config"]

_VOLATILE_KEYS = {
    "transformers_version",
    "_name_or_path",
    "_model_name_or_path",
    "torch_dtype",
    "dtype",
    "architectures",
}


def read_config(directory: Path) -> dict[str, Any]:
    """Return the content of a plain model directory's config.json.

    Raises:
        CheckpointError: it is missing, has no model_type, or the model is quantized.
    """
    config = read_raw_config(directory)
    if not model_type(config):
        raise CheckpointError(f"{directory / 'config.json'} has no model_type; give a Hugging Face model directory")
    if config.get("quantization_config"):
        raise CheckpointError(f"{directory} is quantized; open it with Checkpoint.open, which decodes it")
    return config


def read_raw_config(directory: Path) -> dict[str, Any]:
    """Return the content of a model directory's config.json, of a quantized model too.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = directory / "config.json"
    return read_as(path, dict[str, Any], "model configuration", "download the model again", CheckpointError)


def model_type(config: Mapping[str, Any]) -> str:
    """Return the family in a config.json: llama, qwen3 and so on; empty if it has none.

    As in transformers, a mistral with `layer_types` is a ministral.
    """
    family = str(config.get("model_type", ""))
    return "ministral" if family == "mistral" and "layer_types" in config else family


def end_tokens(directory: Path, config: Mapping[str, Any]) -> set[int]:
    """Return the end tokens in a model's config.json and generation_config.json.

    Args:
        directory: directory of the model.
        config: content of its config.json.

    Raises:
        ConfigError: generation_config.json cannot be read, or an end token is not a token id.
    """
    path = directory / "generation_config.json"
    settings = read_as(path, dict[str, Any], "generation settings", "download it again") if path.is_file() else {}
    tokens: set[int] = set()
    for file, values in (("config.json", config), (path.name, settings)):
        value = values.get("eos_token_id")
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
            raise ConfigError(f"{directory / file}: eos_token_id must be a token id or a list of them, got {value!r}")
        tokens.update(ids)
    return tokens


def architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that determine what the model computes, without those that vary with the saving program."""
    return {key: value for key, value in config.items() if key not in _VOLATILE_KEYS}
