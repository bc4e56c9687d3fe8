"""Atomic files and hashes: at every moment the old or the new version exists under its name, complete."""

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

_AT_CWD, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield the path of an empty temporary file; on success it is synced and replaces `path`, on error it is removed.

    If `path` is a link, its target is replaced.

    Raises:
        ConfigError: `path` is a device, a pipe or a directory.
        DiskError: the disk is full or read-only, or permissions are missing.
    """
    path = Path(path)
    with writing(path):  # raises if a name is too long
        if path.is_symlink():
            path = path.resolve()
        if path.exists() and not path.is_file():
            raise ConfigError(f"not a regular file: {path}; give the path of a file")
    with writing(path), scratch(path.parent, path.name) as directory:
        temporary = directory / "new"
        temporary.write_bytes(b"")
        yield temporary
        temporary.chmod(0o644)
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)


def check_replaceable(path: Path) -> None:
    """Refuse paths that a directory cannot replace: files, links, mount points, the current directory, its parents.

    Raises:
        ConfigError: it is one of these.
    """
    real = path.resolve()
    if path.is_symlink():
        raise ConfigError(f"{path} is a link; give its target, {real}")
    if path.is_file():
        raise ConfigError(f"{path} is a file; give a directory")
    if real == Path.cwd() or real in Path.cwd().parents:
        raise ConfigError(f"{path} is or contains the current directory; give a directory inside it")
    if path.is_mount():
        raise ConfigError(f"{path} is a mount point, which cannot be replaced; give a directory inside it")


@contextlib.contextmanager
def atomic_directory(path: str | Path, own: Collection[str] | None = None) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; on success it takes the place of `path`, on error it is removed.

    An existing directory is replaced once the new one is complete, by exchanging the two in one step. On a file system
    that cannot exchange them, the old one is in a hidden directory between two renames, and
    `coatrt.system.scratch.restore` moves it back after a kill.

    Args:
        path: the directory.
        own: entries of `path` to drop; all others are kept in the new directory. None: drop all.

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
    """Exchange the directories `new` and `path`; on failure `path` is unchanged."""
    if own is not None:
        _copy_missing(path, new, own)
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
        old.rename(new)  # or the next sweep would restore it
    if own is not None:
        _copy_missing(new, path, own)  # files written there in the meantime


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two directories in one step; return False if the file system cannot."""
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    return call is not None and call(_AT_CWD, os.fsencode(one), _AT_CWD, os.fsencode(other), _EXCHANGE) == 0


def _copy_missing(source: Path, target: Path, own: Collection[str]) -> None:
    """Hard-link the entries of `source` that are not in `own` and missing in `target` into `target`."""
    for entry in sorted(source.iterdir()):
        copy = target / entry.name
        if entry.name in own or entry.name == LOCK or is_scratch(entry.name) or os.path.lexists(copy):
            continue
        if entry.is_symlink() or not entry.is_dir():
            _link(entry, copy)
            continue
        if mount := next((folder for folder, _, _ in os.walk(entry) if os.path.ismount(folder)), None):
            raise ConfigError(f"{mount} is a mount point in a directory to be replaced; unmount it first")
        shutil.copytree(entry, copy, symlinks=True, copy_function=_link)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # no hard links on this file system, or not of files of another user
        shutil.copy2(source, target, follow_symlinks=False)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
