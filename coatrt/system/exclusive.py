"""Directories that one process at a time may write."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from coatrt.errors import ConfigError
from coatrt.system.disk import writing
from coatrt.system.locks import LOCK, hold
from coatrt.system.scratch import sweep

__all__ = ["exclusive"]


@contextlib.contextmanager
def exclusive(directory: str | Path) -> Iterator[None]:
    """Hold the lock on a directory, made if missing, that one process at a time may write or replace.

    The lock is a file inside it. Whoever replaces the directory holds the old one's, so the new one is free at once.
    What killed processes have left inside is swept.

    Raises:
        ConfigError: another process holds it, or it cannot be written.
    """
    directory = Path(directory)
    made = not directory.exists()
    path = directory / LOCK
    try:
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            descriptor = hold(path)
    except BlockingIOError:
        raise ConfigError(f"{directory} is being written by another training or search; wait for its end") from None
    try:
        sweep(directory)
        yield
    finally:
        with contextlib.suppress(OSError):
            if descriptor is not None and os.path.samestat(os.fstat(descriptor), path.stat()):
                path.unlink()
            if made:
                directory.rmdir()  # where nothing was written
        if descriptor is not None:
            os.close(descriptor)
