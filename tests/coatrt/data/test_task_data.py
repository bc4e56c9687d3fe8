"""Tokens that the tokenizer has and the model has not: one line, wherever data meet a model."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coatrt.adapter.adapter import Adapter, Evaluator
from coatrt.data.registry import load_task
from coatrt.errors import ConfigError
from coatrt.models.tokenizer import load_tokenizer
from coatrt.searching.run import search
from coatrt.training.run import train
from support.tiny import text_data, tiny_options

SAID = r"contain token 27[2-9] '<extra_\d+>', the model's embedding has 272 rows; resize the embedding"


@pytest.fixture
def tokenizer(tiny_llama: Path, tmp_path: Path) -> Any:
    """A tokenizer with 40 tokens more than the model was resized for: 257 to 296, where the embedding has 272 rows."""
    tokenizer = load_tokenizer(Path(shutil.copytree(tiny_llama, tmp_path / "model")))
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(40)], special_tokens=True)
    return tokenizer


@pytest.mark.parametrize("place", ["train", "held_out", "choices"])
def test_the_token_and_the_rows_are_named_before_any_work(
    place: str, tokenizer: Any, tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("a <extra_20> b " * 60)
    extra = load_task("text", [tmp_path / "text.txt"], tokenizer, 32)
    good = text_data(tiny_llama)
    if place == "choices":
        (tmp_path / "c.jsonl").write_text('{"prompt": "a", "choices": ["b", "<extra_17>"], "answer": 0}\n' * 2)
        data = load_task("choice", [tmp_path / "c.jsonl"], tokenizer, 32)
    else:
        data = replace(good, **{place: getattr(extra, place)}, added_tokens=extra.added_tokens)
    with pytest.raises(ConfigError, match=SAID):
        train(tiny_llama, data, tmp_path / "out", tiny_options())
    assert not (tmp_path / "out").exists()
    if place != "choices":
        with pytest.raises(ConfigError, match=SAID):
            search(tiny_adapter, data, evaluations=1)
        assert not (tiny_adapter / "archive.json").exists()
    evaluator = Evaluator(Adapter.from_pretrained(tiny_adapter))
    with pytest.raises(ConfigError, match=SAID):
        evaluator.measure(None, data)
    good.check_rows(272)
