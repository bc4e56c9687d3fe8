"""Atomic files and hashes: nothing half-written is ever visible under its final name."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from coatrt.errors import ConfigError

__all__ = [
    "atomic_directory",
    "atomic_file",
    "cache_directory",
    "check_replaceable",
    "exclusive",
    "sha256_file",
    "write_text",
]


def cache_directory() -> Path:
    """Return the directory for what can be made again: $COATRT_CACHE, $XDG_CACHE_HOME/coatrt or ~/.cache/coatrt."""
    if "COATRT_CACHE" in os.environ:
        return Path(os.environ["COATRT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "coatrt"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`, on error removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_replaceable(path: Path) -> None:
    """Refuse what cannot be replaced as a directory: files, links, mount points, the current directory, what holds it.

    Raises:
        ConfigError: it is one of these.
    """
    whole = path.resolve()
    if path.is_symlink():
        raise ConfigError(f"{path} is a link; give the directory it names, {whole}")
    if path.is_file():
        raise ConfigError(f"{path} is a file; give a directory")
    if whole == Path.cwd() or whole in Path.cwd().parents:
        raise ConfigError(f"{path} is the current directory or holds it; give a directory inside it")
    if path.is_mount():
        raise ConfigError(f"{path} is a mount point, which cannot be replaced as a whole; give a directory inside it")


@contextlib.contextmanager
def atomic_directory(path: str | Path, own: Collection[str] | None = None) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; on success it takes the place of `path`, on error it is removed.

    A directory already at `path` is replaced only when the new one is complete.

    Args:
        path: the directory.
        own: names inside `path` that go with the directory replaced; others move into the new one. None: all go.

    Raises:
        ConfigError: `path` cannot be replaced, see `check_replaceable`.
    """
    path = Path(path)
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o644)
                _fsync(file)
        if path.exists():
            _replace(path, temporary, own)
        else:
            temporary.rename(path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(path: Path, new: Path, own: Collection[str] | None) -> None:
    """Put directory `new` in the place of `path`; what fails leaves `path` as it was."""
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    old = aside / path.name
    try:
        path.rename(old)
        try:
            new.rename(path)
        except OSError:
            old.rename(path)
            raise
    except OSError:
        aside.rmdir()
        raise
    if own is not None:
        for entry in sorted(old.iterdir()):
            if entry.name not in own and not (path / entry.name).exists():
                entry.rename(path / entry.name)
    shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def exclusive(path: str | Path, what: str) -> Iterator[None]:
    """Hold the lock on a file that one process at a time may go on writing; the system frees it, however that ends.

    Args:
        path: the file; the lock is a hidden file beside it.
        what: what holds it, for the message ("search of this adapter").

    Raises:
        ConfigError: another one holds it.
    """
    path = Path(path)
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        held = lock.acquire()
    except Timeout:
        raise ConfigError(f"{path} is being written by another {what}; wait for its end") from None
    with held:
        yield


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
