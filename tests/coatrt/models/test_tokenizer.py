"""Tokenizers: whatever transformers makes of one is a line, and no code beside it runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from coatrt.errors import CheckpointError
from coatrt.models.tokenizer import load_tokenizer


@pytest.fixture
def bare(tiny_llama: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(tiny_llama / name, directory)
    return directory


@pytest.mark.parametrize("key", ["auto_map", "auto_map of config.json"])
def test_code_beside_a_tokenizer_does_not_run(key: str, bare: Path) -> None:
    (bare / "evil.py").write_text(f"open({str(bare / 'ran')!r}, 'w')\nclass X: pass\n")
    name = "config.json" if "config.json" in key else "tokenizer_config.json"
    values = json.loads((bare / name).read_text())
    values["auto_map"] = {"AutoTokenizer": ["evil.X", None], "AutoConfig": "evil.X"}
    values["tokenizer_class"] = values["model_type"] = "Evil"
    (bare / name).write_text(json.dumps(values))
    try:
        load_tokenizer(bare)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert key == "auto_map of config.json", "a tokenizer of its own code is refused, not replaced"
    assert not (bare / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", {"model": {"type": "Newer"}}),
        ("tokenizer.json", {}),
        ("tokenizer.json", []),
        ("tokenizer.json", None),
        ("tokenizer.json", {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": [["a"]]}}),
        ("tokenizer_config.json", []),
        ("tokenizer_config.json", {"added_tokens_decoder": 7}),
        ("tokenizer_config.json", {"tokenizer_class": 3}),
    ],
)
def test_a_wrong_file_is_one_line(name: str, content: Any, bare: Path) -> None:
    (bare / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="holds no tokenizer that transformers can read") as caught:
        load_tokenizer(bare)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
