"""A disk that is full or read-only: one line that names the path, and caches that do without."""

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
_ANYWHERE = (*_FULL, errno.EROFS, errno.EFBIG)  # of writes alone, whichever file they name
_NAMELESS = (*_ANYWHERE, errno.EIO)  # where the error names no file
_WORDS = {os.strerror(code): code for code in _ANYWHERE}


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Raise a DiskError that names `path` where what happens inside cannot write to it.

    Libraries with a native core (safetensors, tokenizers, ONNX Runtime) say so in the text of errors of their own.
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
            remedy = "give a path that can be written to, or change its permissions"
        raise DiskError(f"{path} cannot be written", reason, remedy) from None


def _code(error: Exception, path: Path) -> int | None:
    """Return the number of the system's error behind an exception, None where it is not about writing `path`."""
    if isinstance(error, OSError) and error.errno is not None:  # shutil's own has none
        if error.errno in _ANYWHERE or not isinstance(error.filename, str | os.PathLike):
            return error.errno if error.errno in _NAMELESS else None
        named, place = Path(error.filename).absolute(), path.absolute()
        above = place.is_relative_to(named)
        if (
            error.errno == errno.ENOENT
        ):  # no directory can be made there, as in /proc; else a file to be read is missing
            return error.errno if above or is_scratch(named.name) else None
        near = above or named.is_relative_to(place) or any(map(is_scratch, named.parts))
        return error.errno if near and error.errno != errno.EAGAIN else None
    if isinstance(error, CoatError):
        return None
    if (found := re.search(r"\(os error (\d+)\)", str(error))) and int(found[1]) != errno.ENOENT:  # as Rust says it
        return int(found[1])
    return next((code for words, code in _WORDS.items() if words in str(error)), None)


@contextlib.contextmanager
def cache_writing() -> Iterator[None]:
    """Go on where what is written inside, which can be made again, cannot be kept; one line says so, once a process."""
    try:
        yield
    except (ConfigError, OSError) as error:
        said = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
        where = f"the cache {cache_directory()} cannot be written"
        warn_once(f"{where} ({said}); later runs compute again what it would hold")


def cached(folder: Path, pattern: str) -> list[Path]:
    """Return what a glob matches in a folder of the cache, sorted; nothing where that cannot be looked at."""
    try:
        return sorted(folder.glob(pattern))
    except OSError:  # a name too long, no permission
        return []


def is_cached(path: Path) -> bool:
    """Return whether a file of the cache is there; one that cannot be looked at is not."""
    try:
        return path.is_file()
    except OSError:
        return False


def cache_directory() -> Path:
    """Return the directory for what can be made again: $COATRT_CACHE, $XDG_CACHE_HOME/coatrt or ~/.cache/coatrt.

    An empty variable counts as none, a relative path is one in the current directory.

    Raises:
        DiskError: there is neither, and no home directory.
    """
    if own := os.environ.get("COATRT_CACHE"):
        return Path(own).absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).absolute() / "coatrt"
    try:
        return Path.home() / ".cache" / "coatrt"
    except RuntimeError:
        remedy = "set COATRT_CACHE to a directory that can be written to"
        raise DiskError("the cache has no place", "no home directory", remedy) from None
