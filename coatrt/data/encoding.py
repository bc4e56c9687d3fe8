"""Text → token ids; any exception of a tokenizer becomes a one-line error. Needs no torch."""

from collections.abc import Sequence
from typing import Any

from coatrt.errors import ConfigError

__all__ = ["encode"]


def encode(tokenizer: Any, texts: Sequence[str], *, special_tokens: bool = False) -> list[list[int]]:
    """Return the token ids of each text.

    Args:
        tokenizer: a transformers tokenizer.
        texts: texts to tokenize.
        special_tokens: whether to add the tokenizer's special tokens, such as a start token.

    Raises:
        ConfigError: the tokenizer fails.
    """
    try:
        rows = tokenizer(list(texts), add_special_tokens=special_tokens, verbose=False)["input_ids"]
        return [[int(token) for token in row] for row in rows]
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # tokenizers raises plain Exceptions, and panics, which are BaseExceptions
        place = getattr(tokenizer, "name_or_path", "") or "the model"
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(f"the tokenizer of {place} fails ({reason}); save the tokenizer again") from None
