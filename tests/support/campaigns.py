"""Campaigns, run short by tests."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "run_short"]

ROOT = Path(__file__).resolve().parents[2]


def run_short(script: str, output: Path, *options: str) -> Any:
    """Run a script of tests/campaigns, and return what it wrote as JSON, and what it printed."""
    command = [sys.executable, ROOT / "tests/campaigns" / script, "--short", "-o", output, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-4000:]
    return json.loads(output.read_text()), done.stdout
