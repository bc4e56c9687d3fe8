"""The tokenizer of a model or bundle, as transformers reads it; code beside it never runs."""

from pathlib import Path
from typing import Any

from coatrt.errors import CheckpointError, reason
from coatrt.models.transformers_config import quiet_transformers

__all__ = ["load_tokenizer"]


def load_tokenizer(directory: str | Path) -> Any:
    """Return the transformers tokenizer saved in a directory.

    Raises:
        CheckpointError: there is none, transformers cannot read it, or it wants to run code of its own.
    """
    quiet_transformers()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain ones
        if isinstance(error, ImportError) or "trust_remote_code" not in str(error):
            said = f"{directory} holds no tokenizer that transformers can read ({reason(error)})"
        else:
            said = f"the tokenizer in {directory} wants to run Python code of its own, which coatrt never does"
        raise CheckpointError(f"{said}; save a plain one beside the model, or update transformers") from None
