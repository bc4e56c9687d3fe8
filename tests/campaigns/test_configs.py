"""A short run of the campaign over config.json and tensors (tests/campaigns/configs.py)."""

from pathlib import Path

import pytest

from support.campaigns import run_short


@pytest.mark.slow
def test_odd_models_are_refused_or_computed_as_transformers_does(tmp_path: Path) -> None:
    figures, _ = run_short("configs.py", tmp_path / "configs.json")
    assert figures["wrong"] == []
    assert figures["outcomes"]["equal"] >= 10
    assert figures["outcomes"]["refused"] >= 5
