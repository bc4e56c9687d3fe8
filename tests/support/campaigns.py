"""Runs the campaigns of tests/campaigns, shortened, as tests."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "run_short"]

ROOT = Path(__file__).resolve().parents[2]


def run_short(script: str, output: Path, *options: str) -> Any:
    """Run a script of tests/campaigns; return its JSON result and its standard output."""
    command = [sys.executable, ROOT / "tests/campaigns" / script, "--short", "-o", output, *options]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert process.returncode == 0, process.stderr[-4000:] + process.stdout[-4000:]
    return json.loads(output.read_text()), process.stdout
