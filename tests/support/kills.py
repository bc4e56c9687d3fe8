"""Processes that die at a chosen step on the disk."""

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
    """Let this process kill itself before its step number `step`, from 0; the steps it takes are added to the list."""
    taken: list[str] = []

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            if len(taken) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            taken.append(name)
            return call(*arguments, **options)

        return counting

    for name in names:
        setattr(os, name, counted(name, getattr(os, name)))
    if locks:
        fcntl.flock = counted("flock", fcntl.flock)
    files._exchange = counted("exchange", files._exchange)
    return taken


def fork(work: Callable[[], object], started: Callable[[int], object] | None = None) -> int:
    """Do some work in a copy of this process, and return its exit code; negative where a signal ended it.

    Args:
        work: what to do; its exit code is 70 where that raises.
        started: called in this process with the id of the copy.
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
    """Do some work in processes that die before their first step, their second and so on; yield after each death.

    It ends with the first process that comes to its end.
    """
    step = 0
    while True:

        def armed(step: int = step) -> None:
            arm(step)
            work()

        code = fork(armed)
        if code == 0:
            return
        assert code == -signal.SIGKILL, code
        yield step
        step += 1


def leftovers(*folders: Path) -> list[str]:
    """Return what is hidden in folders and below them, as nothing is that a finished command leaves."""
    return sorted(str(path) for folder in folders for path in folder.rglob(".*"))
