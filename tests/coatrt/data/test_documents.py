"""Texts from files, cut into blocks, with documents held out, and batches of blocks."""

from pathlib import Path

import pytest
import torch

from coatrt.data.documents import batches, read_documents
from coatrt.errors import ConfigError


def test_every_block_is_seen_once_per_epoch() -> None:
    seen = torch.cat([batches(10, 4, step, seed=3) for step in range(5)]).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert torch.equal(batches(10, 4, 3, 3), batches(10, 4, 3, 3))


def test_missing_and_empty_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no-such\.txt does not exist"):
        read_documents([tmp_path / "no-such.txt"])
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ConfigError, match="no text in"):
        read_documents([tmp_path])
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.txt is UTF-16 \(it begins with"):
        read_documents([tmp_path])
