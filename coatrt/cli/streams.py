"""Standard streams that can print every character, also when they are closed, full or unread."""

import contextlib
import os
import sys
from typing import IO

from coatrt.errors import one_line

__all__ = ["flush", "say", "steady"]


def steady() -> None:
    """Make printing safe: a character outside a stream's encoding is escaped, a closed stream is silent.

    Closed file descriptors 0 to 2 are opened, so that no file opened later receives what is printed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115 - stays open
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Print one line on standard error, if it can be written."""
    with contextlib.suppress(OSError, ValueError):
        print(f"coatrt: {one_line(text)}", file=sys.stderr)


def flush() -> OSError | None:
    """Flush the standard streams and return the first error; a stream that fails is discarded from then on."""
    failure = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            failure = failure or error
            _abandon(stream)
        except ValueError:
            pass  # closed
    return failure


def _abandon(stream: IO[str]) -> None:
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
