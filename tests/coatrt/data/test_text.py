"""Documents as blocks of tokens, some of them held out."""

from pathlib import Path

import pytest

from coatrt.data.text import text_task
from coatrt.errors import ConfigError
from coatrt.models.tokenizer import load_tokenizer


def test_held_out_documents_are_not_trained_on(tiny_llama: Path) -> None:

    tokenizer = load_tokenizer(tiny_llama)
    documents = [chr(ord("a") + i) * 50 for i in range(20)]
    data = text_task(tokenizer, documents, 10)
    held = set(tokenizer("ak")["input_ids"])
    end = {tokenizer.eos_token_id}
    assert set(data.held_out.tokens.unique().tolist()) == held | end
    assert not set(data.train.tokens.unique().tolist()) & held
    assert len(data.train) == 18 * 51 // 10


def test_texts_too_short_for_a_block_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="0 blocks of 64 tokens to train on and 1 to measure on; give"):
        text_task(load_tokenizer(tiny_llama), ["a" * 70], 64)
