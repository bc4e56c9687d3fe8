"""File locks, released by the operating system however the process ends."""

import errno
import fcntl
import os
from pathlib import Path

__all__ = ["LOCK", "hold"]

LOCK = ".lock"
"""Name of the lock file inside the directory it locks."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)


def hold(path: Path) -> int | None:
    """Lock a file, created if missing, and return its descriptor; None if the file system has no locks.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be created.
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
