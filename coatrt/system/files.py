"""Atomic files and hashes: nothing half-written is ever visible under its final name, and nothing is ever missing."""

import contextlib
import ctypes
import hashlib
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from coatrt.errors import ConfigError
from coatrt.system.disk import writing
from coatrt.system.locks import LOCK
from coatrt.system.scratch import OLD, is_scratch, scratch

__all__ = ["atomic_directory", "atomic_file", "check_replaceable", "sha256_file", "write_text"]

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield the path of an empty file beside `path`; on success it is synced and renamed to `path`, on error removed.

    A link stays: the file it names is replaced.

    Raises:
        ConfigError: `path` is a device, a pipe or a directory.
        DiskError: the disk is full or read-only, or permissions are missing.
    """
    path = Path(path)
    with writing(path):  # a name too long shows here
        if path.is_symlink():
            path = path.resolve()
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path} is no regular file and cannot be replaced by one; give the path of a file")
    with writing(path), scratch(path.parent, path.name) as directory:
        temporary = directory / "new"
        temporary.write_bytes(b"")
        yield temporary
        temporary.chmod(0o644)
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)


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

    A directory already at `path` is replaced only when the new one is complete, and at no moment is there neither: the
    two change places. Where a file system cannot do that, the old one waits in a hidden directory between two renames,
    and `coatrt.system.scratch.restore` puts it back after a kill.

    Args:
        path: the directory.
        own: names inside `path` that go with the directory replaced; others are in the new one too. None: all go.

    Raises:
        ConfigError: `path` cannot be replaced, see `check_replaceable`.
        DiskError: the disk is full or read-only, or permissions are missing.
    """
    path = Path(path)
    check_replaceable(path)
    with writing(path), scratch(path.parent, path.name) as directory:
        new = directory / "new"
        new.mkdir()
        yield new
        new.chmod(0o755)
        for entry in new.rglob("*"):
            if entry.is_file():
                entry.chmod(0o644)
            if entry.exists():
                _fsync(entry)
        if path.exists():
            _replace(path, new, own)
        else:
            new.rename(path)
        _fsync(path.parent)


def _replace(path: Path, new: Path, own: Collection[str] | None) -> None:
    """Let directory `new` change places with `path`; what fails leaves `path` as it was."""
    if own is not None:
        _share(path, new, own)
    _fsync(new)
    if not _exchange(new, path):
        old = new.parent / OLD / path.name
        old.parent.mkdir()
        path.rename(old)
        try:
            new.rename(path)
        except OSError:
            old.rename(path)
            raise
        old.rename(new)  # so that it is not taken for one to put back
    if own is not None:
        _share(new, path, own)  # what was written there in the meantime


def _exchange(one: Path, other: Path) -> bool:
    """Let two directories change places in one step, and return whether the file system can."""
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    return call is not None and call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def _share(source: Path, target: Path, own: Collection[str]) -> None:
    """Give `target` what `source` holds of others and `target` does not: the same files, by hard links."""
    for entry in sorted(source.iterdir()):
        place = target / entry.name
        if entry.name in own or entry.name == LOCK or is_scratch(entry.name) or os.path.lexists(place):
            continue
        if entry.is_symlink() or not entry.is_dir():
            _link(entry, place)
            continue
        if mounted := next((folder for folder, _, _ in os.walk(entry) if os.path.ismount(folder)), None):
            raise ConfigError(f"{mounted} is a mount point inside a directory to be replaced; unmount it first")
        shutil.copytree(entry, place, symlinks=True, copy_function=_link)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # no hard links there, or not of files that belong to someone else
        shutil.copy2(source, target, follow_symlinks=False)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
