"""A handful of kills (tests/campaigns/kills.py)."""

from pathlib import Path

import pytest

from support.campaigns import run_short


@pytest.mark.slow
def test_a_handful_of_kills(tmp_path: Path) -> None:
    figures, _ = run_short("kills.py", tmp_path / "kills.json", "--kills", "3")
    assert figures["failures"] == []
    assert figures["kills"] >= 6
