"""A config.json as completed by transformers: every key of its family, with defaults."""

from collections.abc import Mapping
from typing import Any

from coatrt.errors import CheckpointError, reason
from coatrt.models.config_file import model_type

__all__ = ["complete_config", "quiet_transformers"]

_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
_OTHER_ROPE_TYPES = {"phi3": ("su",), "hunyuan_v1_dense": ("dynamic",)}
"""What families call longrope, and a fixed factor on the base."""


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
    for kind in _rope_types(values.get("rope_parameters") or values.get("rope_scaling") or {}):
        if kind not in (*_ROPE_TYPES, *_OTHER_ROPE_TYPES.get(family, ())):
            raise CheckpointError(  # before transformers requires its other fields
                f"rope type {kind!r} cannot be exported: graphs have fixed rotary tables; "
                f"allowed: {', '.join(_ROPE_TYPES)}; use another model"
            )
    try:
        return CONFIG_MAPPING[family].from_dict({**values, "model_type": family})
    except Exception as error:  # a key of the wrong type raises many kinds
        raise CheckpointError(
            f"not a valid {family} configuration: config.json ({reason(error)}); correct that key or download it again"
        ) from None


def _rope_types(rope: Any) -> list[Any]:
    """Return the types in rotary parameters, which may be given for each kind of layer."""
    if not isinstance(rope, dict):
        return [rope]
    if rope and all(isinstance(value, dict) or value is None for value in rope.values()):
        return [kind for value in rope.values() for kind in _rope_types(value or {})]
    return [rope.get("rope_type", rope.get("type", "default"))]
