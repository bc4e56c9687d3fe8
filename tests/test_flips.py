"""A few flips of the campaign: what coatrt keeps is not read altered."""

import os
from pathlib import Path

from campaigns.flips import campaign


def test_no_flipped_byte_is_accepted(tmp_path: Path) -> None:
    before = os.environ.get("COATRT_CACHE")
    result = campaign(60, 1, tmp_path)
    assert os.environ.get("COATRT_CACHE") == before
    assert result["wrong"] == []
    assert result["flips"] == 60
    assert {"adapter", "training state", "archive", "device timings", "codes", "moments", "engines", "bundle"} <= set(
        result["files"]
    )
    assert result["files"]["training state"] == 3
