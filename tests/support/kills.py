"""Processes that are killed at a chosen file system call."""

import contextlib
import fcntl
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from coatrt.system import files

__all__ = ["arm", "fork", "kill_at_each_step", "leftovers"]

_STEPS = ("open", "mkdir", "rename", "replace", "link", "symlink", "unlink", "rmdir", "chmod", "fsync")


def arm(step: int, names: tuple[str, ...] = _STEPS, *, locks: bool = True) -> list[str]:
    """Make this process kill itself before file system call number `step`, from 0; return the growing list of calls."""
    calls: list[str] = []

    def count(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            if len(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(name)
            return call(*arguments, **options)

        return wrapper

    for name in names:
        setattr(os, name, count(name, getattr(os, name)))
    if locks:
        fcntl.flock = count("flock", fcntl.flock)
    files._exchange = count("exchange", files._exchange)
    return calls


def fork(work: Callable[[], object], started: Callable[[int], object] | None = None) -> int:
    """Do some work in a fork of this process and return its exit code; negative if a signal ended it.

    Args:
        work: the work; the exit code is 70 if it raises.
        started: called in this process with the child's process id.
    """
    child = os.fork()
    if child == 0:
        code = 70
        try:
            work()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(code)
    if started is not None:
        started(child)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at_each_step(work: Callable[[], object]) -> Iterator[int]:
    """Do some work in processes killed before their first file system call, their second, and so on; yield after each.

    The last process is the first that finishes its work.
    """
    step = 0
    while True:

        def work_until_kill(step: int = step) -> None:
            arm(step)
            work()

        code = fork(work_until_kill)
        if code == 0:
            return
        assert code == -signal.SIGKILL, code
        yield step
        step += 1


def leftovers(*folders: Path) -> list[str]:
    """Return the hidden files in folders and their subfolders; a finished command leaves none."""
    return sorted(str(path) for folder in folders for path in folder.rglob(".*"))
