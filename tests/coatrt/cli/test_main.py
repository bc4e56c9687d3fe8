"""The command as a process: how it ends when it is told to."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest


@pytest.mark.rtx
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_build_that_is_told_to_end_stops_its_builder_and_leaves_nothing(
    tiny_adapter: Path, tmp_path: Path, number: signal.Signals
) -> None:
    pytest.importorskip("tensorrt_rtx")
    place, temporary = tmp_path / "bundles", tmp_path / "tmp"
    temporary.mkdir()

    def start(*options: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "coatrt", "build", str(tiny_adapter), "-o", str(place / "b"), *options]
        environment = {**os.environ, "TMPDIR": str(temporary)}
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)

    process = start("--target", "rtx-5090", "--no-cache")
    try:
        workers: list[psutil.Process] = []
        deadline = time.monotonic() + 120
        while not workers and process.poll() is None and time.monotonic() < deadline:
            workers = [
                child for child in psutil.Process(process.pid).children() if "worker" in " ".join(child.cmdline())
            ]
        assert workers, "no builder was started"
        if number == signal.SIGKILL:
            time.sleep(0.5)  # it asks the system to end with its parent first of all
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
        assert not said
        assert psutil.wait_procs(workers, timeout=30)[1] == []
        assert [path.name for path in temporary.iterdir() if "coatrt" in path.name] == []
        if number == signal.SIGKILL:
            assert list(place.iterdir())
            again = start("--target", "cpu")
            again.communicate(timeout=60)
            assert (again.returncode, [path.name for path in place.iterdir()]) == (0, ["b"])
        else:
            assert list(place.iterdir()) == []
    finally:
        process.kill()
