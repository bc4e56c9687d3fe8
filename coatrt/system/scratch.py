"""Scratch directories: hidden, locked by their process, and swept by the next one where that process is gone."""

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
"""Name, in a scratch directory, of the folder that a directory waits in while another takes its place."""

_MARK = ".coatrt-"
_LONGEST = 200  # characters of a name, so that the hidden one stays below the file system's 255 bytes
_NAME = re.compile(r"\..*\.coatrt-\w{16}", re.DOTALL)


def is_scratch(name: str) -> bool:
    """Return whether a file name is one that `scratch` makes."""
    return _NAME.fullmatch(name) is not None


@contextlib.contextmanager
def scratch(parent: Path, name: str) -> Iterator[Path]:
    """Yield a new hidden directory in `parent`, made if missing, and remove it; `sweep` it first of what others left.

    Args:
        parent: where it is.
        name: what it is for, part of its own name.
    """
    parent.mkdir(parents=True, exist_ok=True)
    sweep(parent)
    short, descriptor = os.fsdecode(os.fsencode(name)[:_LONGEST]), None
    directory = Path()  # until it has a name
    try:
        while True:  # named before it is made: a signal at any moment finds what to remove
            directory = parent / f".{short}{_MARK}{secrets.token_hex(8)}"
            directory.mkdir(mode=0o700)
            try:
                descriptor = hold(directory / LOCK)
                break
            except (BlockingIOError, FileNotFoundError):
                continue  # another process found it before it was locked, and sweeps it
        yield directory
    finally:
        try:
            _remove(directory)
        finally:  # a signal may have ended that one
            _remove(directory)
            if descriptor is not None:
                os.close(descriptor)


def _remove(directory: Path) -> None:
    if is_scratch(directory.name):
        shutil.rmtree(directory, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Remove the scratch directories in `parent` whose process is gone; a directory put aside comes back first."""
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in [entry for entry in entries if is_scratch(entry.name) and entry.is_dir(follow_symlinks=False)]:
            with contextlib.suppress(OSError):
                if entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                    _settle(Path(entry.path))


def _settle(directory: Path) -> None:
    """Put back what a process that is gone has put aside, and remove its scratch directory."""
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
    """Put a directory back that a process, killed while it replaced it, has left beside its place."""
    if not path.exists():
        sweep(path.parent)
