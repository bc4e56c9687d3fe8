"""Runs programs in a separate process."""

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["run_program"]


def run_program(code: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run Python code, which may import `support`, in a separate process, and return the finished process."""
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
