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
    """Lock a directory, created if missing, so that one process at a time writes or replaces it.

    The lock is a file inside it. A process that replaces the directory holds the lock of the old one, so the new one is
    free at once. Scratch directories that killed processes left inside are removed.

    Raises:
        ConfigError: another process holds it, or it cannot be written.
    """
    directory = Path(directory)
    created = not directory.exists()
    path = directory / LOCK
    try:
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            descriptor = hold(path)
    except BlockingIOError:
        raise ConfigError(f"{directory} is in use by another training or search; wait until it ends") from None
    try:
        sweep(directory)
        yield
    finally:
        with contextlib.suppress(OSError):
            if descriptor is not None and os.path.samestat(os.fstat(descriptor), path.stat()):
                path.unlink()
            if created:
                directory.rmdir()  # only succeeds if nothing was written
        if descriptor is not None:
            os.close(descriptor)
