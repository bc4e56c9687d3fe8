"""Standard streams that hold every character, and that may be closed, full or read by nobody."""

import contextlib
import os
import sys
from typing import IO

from coatrt.errors import one_line

__all__ = ["flush", "say", "steady"]


def steady() -> None:
    """Make printing safe: a character that a stream has no code for is written as an escape, a closed stream is silent.

    The numbers 0 to 2 are taken even where they were closed, so that no file that is opened later gets what is printed.
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
    """Print one line on standard error, if anybody hears it."""
    with contextlib.suppress(OSError, ValueError):
        print(f"coatrt: {one_line(text)}", file=sys.stderr)


def flush() -> OSError | None:
    """Write out what was printed; return why that fails. What is left then goes nowhere, without a second error."""
    failed = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            failed = failed or error
            _abandon(stream)
        except ValueError:
            pass  # closed
    return failed


def _abandon(stream: IO[str]) -> None:
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
