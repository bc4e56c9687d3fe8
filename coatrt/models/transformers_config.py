"""A config.json as completed by transformers: every key of its family, with defaults."""

from collections.abc import Mapping
from typing import Any

from coatrt.errors import CheckpointError, reason
from coatrt.models.config_file import model_type

__all__ = ["complete_config", "quiet_transformers"]

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def quiet_transformers() -> None:
    """Disable warnings and progress bars of transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def complete_config(values: Mapping[str, Any]) -> Any:
    """Return the transformers configuration for the content of a config.json.

    Raises:
        CheckpointError: transformers does not know the family or refuses a value.
    """
    quiet_transformers()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = model_type(values)
    if family not in CONFIG_MAPPING:
        raise CheckpointError(f"this transformers does not know model_type {family!r}; update it or use another model")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind not in _ROPE_TYPES:  # before transformers requires its other fields
        raise CheckpointError(
            f"rope type {kind!r} cannot be exported: graphs have fixed rotary tables; allowed: {', '.join(_ROPE_TYPES)}"
        )
    try:
        return CONFIG_MAPPING[family].from_dict(dict(values))
    except Exception as error:  # a key of the wrong type raises many kinds
        raise CheckpointError(
            f"not a valid {family} configuration: config.json ({reason(error)}); correct that key or download it again"
        ) from None
