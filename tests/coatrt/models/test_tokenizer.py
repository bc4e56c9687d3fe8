"""Tokenizers: whatever transformers makes of one is a line, and no code beside it runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from coatrt.errors import CheckpointError, ConfigError
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
    assert name in refused(bare)


def refused(directory: Path) -> str:
    with pytest.raises(CheckpointError, match="holds no tokenizer that transformers can read") as caught:
        load_tokenizer(directory)
    said = str(caught.value)
    assert "\n" not in said and "; " in said
    assert len(said) < 900
    return said.partition("can read")[2]


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[1]", b"\xff", b"\xef\xbb\xbf{}", b'{"a": 1, "a": 2}', "{}".encode("utf-16")]
)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
def test_the_settings_at_fault_are_named(name: str, data: bytes, bare: Path) -> None:
    (bare / name).write_bytes(data)
    assert f"{bare / name} " in refused(bare)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff", b"\xef\xbb\xbf{}", b'{"version": "1.0"}', b"version https://git-lfs"]
)
def test_the_vocabulary_at_fault_is_named(data: bytes, bare: Path) -> None:
    (bare / "tokenizer.json").write_bytes(data)
    assert str(bare / "tokenizer.json") in refused(bare)


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"a\nb\xff", "line 2 is not UTF-8"), (b"\xef\xbb\xbf{{ messages }}", "begins with a byte order mark")],
)
@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"])
def test_a_template_that_is_no_plain_text_is_named(name: str, data: bytes, said: str, bare: Path) -> None:
    (bare / name).parent.mkdir(exist_ok=True)
    (bare / name).write_bytes(data)
    assert f"{bare / name} {said}" in refused(bare)


@pytest.mark.parametrize(
    ("name", "data"),
    [("vocab.json", b"[]"), ("vocab.json", b"{"), ("vocab.json", b'{"a": 0, "a": 1}'), ("merges.txt", b"\xff")],
)
def test_files_of_an_older_form_are_named(name: str, data: bytes, bare: Path) -> None:
    (bare / "tokenizer.json").unlink()
    (bare / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (bare / "vocab.json").write_text('{"a": 0, "b": 1, "<|endoftext|>": 2}')
    (bare / "merges.txt").write_text("#version: 0.2\na b\n")
    (bare / name).write_bytes(data)
    assert str(bare / name) in refused(bare)


def test_no_vocabulary_is_said(bare: Path, tmp_path: Path) -> None:
    (bare / "tokenizer.json").unlink()
    assert "no file tokenizer.json, vocab.json" in refused(bare)
    assert "no file tokenizer.json, vocab.json" in refused(tmp_path / "none")
    (bare / "tokenizer.json").mkdir()
    assert "no file tokenizer.json, vocab.json" in refused(bare)
    (bare / "tokenizer_config.json").unlink()
    (bare / "tokenizer_config.json").mkdir()
    assert f"{bare / 'tokenizer_config.json'} cannot be read: Is a directory" in refused(bare)


def test_a_template_that_is_no_text_is_named(bare: Path) -> None:
    from coatrt.data.chat_template import chat_template

    values = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(json.dumps({**values, "chat_template": {"a": "b"}}))
    with pytest.raises(ConfigError, match=r"the chat template of .*/tokenizer_config\.json cannot be used"):
        chat_template(load_tokenizer(bare))
    (bare / "chat_template.jinja").write_text("{{ messages }}")
    found = chat_template(load_tokenizer(bare))
    assert found is not None and found.place == str(bare / "chat_template.jinja")
