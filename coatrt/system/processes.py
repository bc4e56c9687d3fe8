"""Child processes that end with this one."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

__all__ = ["end_children", "end_with_parent", "run_child"]

_PR_SET_PDEATHSIG = 1  # of prctl(2)
_running: set["subprocess.Popen[str]"] = set()


def run_child(command: Sequence[str], environment: Mapping[str, str]) -> tuple[str, int]:
    """Run a command and return its output and exit code; `end_children` kills it early."""
    pipe, merged = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=merged, text=True, errors="replace") as child:
        _running.add(child)
        try:
            output, _ = child.communicate()
        finally:
            _running.discard(child)
    return output, child.returncode


def end_children() -> None:
    """Kill every command that `run_child` is running, in any thread."""
    for child in list(_running):
        child.kill()


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, process `parent`, ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        sys.exit(1)
