"""Processes that this one starts: they end with it."""

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
    """Run a command to its end, and return all that it printed and its exit code; `end_children` ends it before."""
    pipe, joined = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=joined, text=True, errors="replace") as child:
        _running.add(child)
        try:
            said, _ = child.communicate()
        finally:
            _running.discard(child)
    return said, child.returncode


def end_children() -> None:
    """Kill what `run_child` runs, in whichever thread."""
    for child in list(_running):
        child.kill()


def end_with_parent(parent: int) -> None:
    """Let the system kill this process when process `parent`, which started it, is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before
        sys.exit(1)
