"""Processes that are started: they end with the one that started them, killed or told to."""

import os
import subprocess
import sys
import threading
import time

import psutil
import pytest

from coatrt.system.processes import end_children, run_child

pytestmark = pytest.mark.fast

_CHILD = """
import sys, time
from coatrt.system.processes import end_with_parent
end_with_parent(int(sys.argv[1]))
print("ready", flush=True)
time.sleep(60)
"""
_PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_child_ends_where_its_parent_is_killed() -> None:
    command = [sys.executable, "-c", _PARENT, _CHILD]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    assert psutil.wait_procs([child], timeout=10)[1] == []


def test_a_child_whose_parent_is_gone_ends_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", _CHILD, "1"], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (1, "")


def test_children_of_threads_are_ended_and_what_they_said_is_kept() -> None:
    results: list[tuple[str, int]] = []
    command = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    thread = threading.Thread(target=lambda: results.append(run_child(command, os.environ)))
    thread.start()
    deadline = time.monotonic() + 30
    while thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.2)
        end_children()
    thread.join(1)
    assert results[0][1] == -9
    assert run_child([sys.executable, "-c", "print('all'); raise SystemExit(3)"], os.environ) == ("all\n", 3)
