"""Disks that are full or read-only: errors that name the path, and caches that are optional."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from coatrt.errors import CoatError, ConfigError, DiskError
from coatrt.system.notices import warn_once
from coatrt.system.scratch import is_scratch

__all__ = ["cache_directory", "cache_writing", "cached", "is_cached", "writing"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_WRITE_ERRORS = (*_FULL, errno.EROFS, errno.EFBIG)  # only writes raise these, so the file they name does not matter
_UNNAMED_ERRORS = (*_WRITE_ERRORS, errno.EIO)  # about writing even if the error names no file
_MESSAGES = {os.strerror(code): code for code in _WRITE_ERRORS}


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn errors about writing to `path` inside the context into a DiskError that names it.

    Native libraries (safetensors, tokenizers, ONNX Runtime) report such errors only in their messages.
    """
    try:
        yield
    except DiskError as error:
        raise DiskError(f"{path} cannot be written", error.reason, error.remedy) from None
    except Exception as error:
        code = _code(error, Path(path))
        if code is None:
            raise
        reason, remedy = os.strerror(code), "check the path, its permissions and the free disk space"
        if code in _FULL:
            remedy = "free disk space, or give a path on another disk"
        elif code == errno.EFBIG:
            remedy = "raise the limit on file sizes (ulimit -f), or give a path on another disk"
        elif code in (errno.EROFS, errno.EACCES, errno.EPERM):
            remedy = "give a writable path, or change its permissions"
        raise DiskError(f"{path} cannot be written", reason, remedy) from None


def _code(error: Exception, path: Path) -> int | None:
    """Return the errno behind an exception, None if it is not about writing `path`."""
    if isinstance(error, OSError) and error.errno is not None:  # shutil.Error has none
        if error.errno in _WRITE_ERRORS or not isinstance(error.filename, str | os.PathLike):
            return error.errno if error.errno in _UNNAMED_ERRORS else None
        file, target = Path(error.filename).absolute(), path.absolute()
        above = target.is_relative_to(file)
        if error.errno == errno.ENOENT:  # a directory cannot be created, as in /proc; otherwise an input is missing
            return error.errno if above or is_scratch(file.name) else None
        nearby = above or file.is_relative_to(target) or any(map(is_scratch, file.parts))
        return error.errno if nearby and error.errno != errno.EAGAIN else None
    if isinstance(error, CoatError):
        return None
    if (match := re.search(r"\(os error (\d+)\)", str(error))) and int(match[1]) != errno.ENOENT:  # Rust's format
        return int(match[1])
    return next((code for message, code in _MESSAGES.items() if message in str(error)), None)


@contextlib.contextmanager
def cache_writing() -> Iterator[None]:
    """Continue without the cache if the writes inside fail; warn once a process."""
    try:
        yield
    except (ConfigError, OSError) as error:
        cause = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
        where = f"the cache {cache_directory()} cannot be written"
        warn_once(f"{where} ({cause}); later runs repeat this work")


def cached(folder: Path, pattern: str) -> list[Path]:
    """Return what a glob matches in a folder of the cache, sorted; nothing if the folder cannot be read."""
    try:
        return sorted(folder.glob(pattern))
    except OSError:  # a name too long, no permission
        return []


def is_cached(path: Path) -> bool:
    """Return whether a file of the cache exists; False if its folder cannot be read."""
    try:
        return path.is_file()
    except OSError:
        return False


def cache_directory() -> Path:
    """Return the cache directory: $COATRT_CACHE, else $XDG_CACHE_HOME/coatrt, else ~/.cache/coatrt.

    An empty variable counts as unset. A relative path starts at the current directory.

    Raises:
        DiskError: both variables are unset and there is no home directory.
    """
    if own := os.environ.get("COATRT_CACHE"):
        return Path(own).absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).absolute() / "coatrt"
    try:
        return Path.home() / ".cache" / "coatrt"
    except RuntimeError:
        remedy = "set COATRT_CACHE to a writable directory"
        raise DiskError("no cache directory", "no home directory", remedy) from None
