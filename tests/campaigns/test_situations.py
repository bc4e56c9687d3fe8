"""The situations of three commands; docs/reference/errors.md says what they say (tests/campaigns/situations.py)."""

import os
from pathlib import Path

import pytest

from support.campaigns import ROOT, run_short


@pytest.mark.slow
def test_situations_of_three_commands(tmp_path: Path) -> None:
    outcomes, table = run_short("situations.py", tmp_path / "situations.json")
    assert [outcome for outcome in outcomes if outcome["problem"]] == []
    if os.geteuid():
        pytest.skip("disks of their own need root")
    assert len(outcomes) >= 25
    documented = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8").splitlines()
    rows = {_without_commands(row) for row in documented}
    for row in table.splitlines()[2:]:
        assert _without_commands(row) in rows, (
            f"not in docs/reference/errors.md: {row}; run tests/campaigns/situations.py"
        )


def _without_commands(row: str) -> tuple[str, ...]:
    cells = row.split(" | ")
    return (*cells[:1], *cells[2:])
