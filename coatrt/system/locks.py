"""Locks that a living process holds; the system frees them, however their holder ends."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from coatrt.errors import ConfigError
from coatrt.system.disk import writing

__all__ = ["LOCK", "exclusive", "hold"]

LOCK = ".lock"
"""Name of the file that is locked, inside the directory that it stands for."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)


def hold(path: Path) -> int | None:
    """Lock a file, made if missing, and return the descriptor that holds it; None where a file system has no locks.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be made.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass  # removed by its last holder, or replaced with its directory: lock the new one
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                return None
            raise
        os.close(descriptor)


@contextlib.contextmanager
def exclusive(directory: str | Path) -> Iterator[None]:
    """Hold the lock on a directory, made if missing, that one process at a time may write or replace.

    The lock is a file inside it. Whoever replaces the directory holds the old one's, so the new one is free at once.

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
        yield
    finally:
        with contextlib.suppress(OSError):
            if descriptor is not None and os.path.samestat(os.fstat(descriptor), path.stat()):
                path.unlink()
            if made:
                directory.rmdir()  # where nothing was written
        if descriptor is not None:
            os.close(descriptor)
