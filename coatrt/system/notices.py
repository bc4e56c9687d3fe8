"""Warnings: one line on standard error, each once per process."""

import contextlib
import functools
import sys

__all__ = ["warn_once"]


@functools.cache
def warn_once(line: str) -> None:
    """Print a line on standard error, if it is open, unless it was printed before."""
    with contextlib.suppress(OSError, ValueError):
        print(f"coatrt: {line}", file=sys.stderr, flush=True)
