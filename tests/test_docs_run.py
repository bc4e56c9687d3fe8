"""The shell and Python blocks of README, quickstart and guides run as they are printed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.documents import ROOT, blocks

RUNNER = ROOT / "tests/campaigns/documents.py"


def test_blocks_run(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai: make test installs it")
    command = [sys.executable, RUNNER, "-o", tmp_path / "outcomes.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    assert [row for row in outcomes if row["problem"]] == []
    ran = {(row["page"], row["line"]) for row in outcomes}
    for page in [
        "README.md",
        "docs/quickstart.md",
        *(f"docs/guides/{path.name}" for path in ROOT.glob("docs/guides/*")),
    ]:
        for block in blocks(ROOT / page):
            if block.language in ("sh", "python"):
                assert (page, block.line) in ran or block.reason, f"{page}:{block.line} is not run and does not say why"
            else:
                assert block.language in ("cpp", "cmake", "json", "text"), f"{page}:{block.line} has no language"
