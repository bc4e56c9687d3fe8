"""Prompts from the command line, from files and from standard input."""

import sys
from collections.abc import Sequence
from pathlib import Path

from coatrt.errors import ConfigError
from coatrt.system.utf8 import decode

__all__ = ["check_stops", "read_prompts"]

_STDIN = "-"
_MOST_BYTES = 64 << 20


def read_prompts(texts: Sequence[str], files: Sequence[str]) -> list[str]:
    """Return the prompts of `-p` and then those of `-f`.

    Args:
        texts: prompts; "-" stands for standard input, which is also read if there is no other prompt and it is not a
            terminal.
        files: paths of UTF-8 files with one prompt each; "-" stands for standard input.

    Raises:
        ConfigError: there is no prompt, standard input is named twice, or a file cannot be read.
    """
    if not texts and not files:
        prompt = "" if _is_terminal() else _read(_STDIN)
        if not prompt:
            raise ConfigError("no prompt: give -p TEXT, -f FILE, or write it to standard input")
        return [prompt]
    if [*texts, *files].count(_STDIN) > 1:
        raise ConfigError("standard input holds one prompt: give '-' once")
    return [_read(text) if text == _STDIN else text for text in texts] + [_read(path) for path in files]


def check_stops(stops: Sequence[str]) -> None:
    """Refuse an empty stop string, which would end every text at once.

    Raises:
        ConfigError: there is one.
    """
    if not all(stops):
        raise ConfigError("--stop must be a text of at least one character, got an empty one")


def _is_terminal() -> bool:
    try:
        return sys.stdin.isatty()
    except (AttributeError, ValueError):  # none, or closed
        return True


def _read(path: str) -> str:
    """Return the text of a file without the line end at its end, which editors and `echo` add."""
    where = "standard input" if path == _STDIN else f"prompt {path}"
    try:
        if path == _STDIN:
            data = sys.stdin.buffer.read(_MOST_BYTES + 1)
        else:
            with Path(path).open("rb") as stream:
                data = stream.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{where} cannot be read ({reason}); give a UTF-8 file") from None
    if len(data) > _MOST_BYTES:
        raise ConfigError(f"{where} must be at most {_MOST_BYTES >> 20} MiB; give a shorter prompt")
    return decode(data, where).removesuffix("\n").removesuffix("\r")
