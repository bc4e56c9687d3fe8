"""The command as a process: how it ends when it is told to."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest


@pytest.mark.rtx
def test_a_build_that_is_terminated_stops_its_builder_and_leaves_nothing(tiny_adapter: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    place = tmp_path / "bundles"
    command = ["-m", "coatrt", "build", tiny_adapter, "--target", "rtx-5090", "-o", place / "b", "--no-cache"]
    process = subprocess.Popen([sys.executable, *map(str, command)], stderr=subprocess.PIPE, text=True)
    try:
        workers: list[psutil.Process] = []
        deadline = time.monotonic() + 120
        while not workers and process.poll() is None and time.monotonic() < deadline:
            workers = [
                child for child in psutil.Process(process.pid).children() if "worker" in " ".join(child.cmdline())
            ]
        assert workers, "no builder was started"
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "Aborted!" in said
        assert psutil.wait_procs(workers, timeout=30)[1] == []
        assert list(place.iterdir()) == []
    finally:
        process.kill()
