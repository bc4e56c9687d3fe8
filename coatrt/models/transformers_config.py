"""A config.json as transformers completes it: every key that its family has, defaults filled in."""

from collections.abc import Mapping
from typing import Any

from coatrt.errors import CheckpointError, reason
from coatrt.models.config_file import model_type

__all__ = ["complete_config", "quiet_transformers"]

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def quiet_transformers() -> None:
    """Keep transformers from printing warnings and bars of its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def complete_config(values: Mapping[str, Any]) -> Any:
    """Return the transformers configuration of the content of a config.json.

    Raises:
        CheckpointError: transformers does not know the family, or refuses a value.
    """
    quiet_transformers()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = model_type(values)
    if family not in CONFIG_MAPPING:
        raise CheckpointError(f"model_type {family!r} is unknown to this transformers; update it or give another model")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind not in _ROPE_TYPES:  # before transformers asks for its other fields
        raise CheckpointError(
            f"rope type {kind!r} cannot be exported: a graph has fixed rotary tables; allowed: {', '.join(_ROPE_TYPES)}"
        )
    try:
        return CONFIG_MAPPING[family].from_dict(dict(values))
    except Exception as error:  # whatever a key of a wrong type meets
        raise CheckpointError(
            f"config.json is no valid {family} configuration ({reason(error)}); correct that key or fetch it again"
        ) from None
