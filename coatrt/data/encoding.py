"""Text → token ids, with one line for whatever a tokenizer raises; needs no torch."""

from collections.abc import Sequence
from typing import Any

from coatrt.errors import ConfigError

__all__ = ["encode"]


def encode(tokenizer: Any, texts: Sequence[str], *, special_tokens: bool = False) -> list[list[int]]:
    """Return the token ids of each text.

    Args:
        tokenizer: a transformers tokenizer.
        texts: what to tokenize.
        special_tokens: whether the tokenizer adds its own, such as one for the start.

    Raises:
        ConfigError: the tokenizer fails.
    """
    try:
        rows = tokenizer(list(texts), add_special_tokens=special_tokens, verbose=False)["input_ids"]
        return [[int(token) for token in row] for row in rows]
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # tokenizers raises plain Exceptions, and panics that are none
        place = getattr(tokenizer, "name_or_path", "") or "the model"
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(f"the tokenizer of {place} fails ({reason}); save it again beside the model") from None
