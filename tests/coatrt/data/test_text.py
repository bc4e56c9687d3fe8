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


class _Letters:
    """A tokenizer of letters; one that has a start token puts it before a text."""

    eos_token_id = 0

    def __init__(self, start: list[int]) -> None:
        self.start = start

    def __call__(self, texts: list[str], *, add_special_tokens: bool, verbose: bool) -> dict[str, list[list[int]]]:
        start = self.start if add_special_tokens else []
        return {"input_ids": [start + [ord(letter) for letter in text] for text in texts]}


def test_a_block_begins_with_the_start_token_where_the_tokenizer_has_one() -> None:
    a, b, c = map(ord, "abc")
    plain = text_task(_Letters([]), ["abc"], 2, held_out=["abc"])
    assert plain.train.tokens.tolist() == [[a, b], [c, 0]]
    marked = text_task(_Letters([7]), ["abc"], 3, held_out=["abc"])
    assert marked.train.tokens.tolist() == [[7, a, b], [7, c, 0]]
    assert marked.train.target_count == 4  # each letter, and the end
