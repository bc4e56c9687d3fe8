"""Scratch directories: hidden, locked by their process, and removed by the next process if that one was killed."""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from coatrt.system.locks import LOCK, hold

__all__ = ["OLD", "is_scratch", "restore", "scratch", "sweep"]

OLD = "old"
"""Folder of a scratch directory that holds the old version of a directory while it is being replaced."""

_MARK = ".coatrt-"
_MAX_BYTES = 200  # of a name, so that the hidden name stays below the file system's 255 bytes
_NAME = re.compile(r"\..*\.coatrt-\w{16}", re.DOTALL)


def is_scratch(name: str) -> bool:
    """Return whether a file name is that of a scratch directory."""
    return _NAME.fullmatch(name) is not None


@contextlib.contextmanager
def scratch(parent: Path, name: str) -> Iterator[Path]:
    """Yield a new hidden directory in `parent`, created if missing, and remove it; `sweep` the parent first.

    Parents that it created and that are empty at the end, as nothing was written, are removed too.

    Args:
        parent: the directory around it.
        name: what it is for; part of its own name.
    """
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    sweep(parent)
    short, descriptor = os.fsdecode(os.fsencode(name)[:_MAX_BYTES]), None
    directory = Path()  # until it has a name
    try:
        while True:  # the name is set before mkdir, so that a signal at any moment leaves nothing behind
            directory = parent / f".{short}{_MARK}{secrets.token_hex(8)}"
            parent.mkdir(parents=True, exist_ok=True)
            try:
                directory.mkdir(mode=0o700)
            except FileNotFoundError:
                if parent.is_dir():
                    raise
                continue  # another process removed the empty parent
            try:
                descriptor = hold(directory / LOCK)
                break
            except (BlockingIOError, FileNotFoundError):
                continue  # another process swept it before it was locked
        yield directory
    finally:
        try:
            _remove(directory)
        finally:  # again, as a signal may have interrupted the first
            _remove(directory)
            if descriptor is not None:
                os.close(descriptor)
            with contextlib.suppress(OSError):  # not empty
                for folder in missing:
                    folder.rmdir()


def _remove(directory: Path) -> None:
    if is_scratch(directory.name):
        shutil.rmtree(directory, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Remove the scratch directories in `parent` whose process has ended, and restore directories they hold."""
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in [entry for entry in entries if is_scratch(entry.name) and entry.is_dir(follow_symlinks=False)]:
            with contextlib.suppress(OSError):
                if entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                    _settle(Path(entry.path))


def _settle(directory: Path) -> None:
    """Restore the directories that an ended process moved aside, and remove its scratch directory."""
    descriptor = hold(directory / LOCK)
    if descriptor is None:
        return
    try:
        aside = directory / OLD
        for old in aside.iterdir() if aside.is_dir() else ():
            if not os.path.lexists(directory.parent / old.name):
                old.rename(directory.parent / old.name)
        shutil.rmtree(directory, ignore_errors=True)
    finally:
        os.close(descriptor)


def restore(path: Path) -> None:
    """Restore a directory if a process was killed while replacing it."""
    if not path.exists():
        sweep(path.parent)
