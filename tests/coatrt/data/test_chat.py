"""Conversations: answer spans against a rendering by hand, and templates that give answers no fixed place."""

from pathlib import Path
from typing import Any

import pytest

from coatrt.data.chat import chat_task
from coatrt.data.conversation import Conversation
from coatrt.data.examples import IGNORED, Examples
from coatrt.errors import ConfigError
from coatrt.models.tokenizer import load_tokenizer

IM = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im|>system\nBe kind.<|end|>\n{% endif %}"
    "<|im|>{{ m['role'] }}\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im|>assistant\n{% endif %}"
)
TALK = Conversation((("user", "hi"), ("assistant", "yes sir"), ("user", "so?"), ("assistant", "no")))


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    """A byte tokenizer whose end token, <|end|>, is one token."""
    return load_tokenizer(tiny_llama)


def answers(tokenizer: Any, examples: Examples, row: int = 0) -> list[str]:
    """Return the texts of the runs of targets in a row."""
    runs: list[list[int]] = [[]]
    for target in examples.targets[row].tolist():
        if target == IGNORED:
            runs.append([])
        else:
            runs[-1].append(target)
    return [tokenizer.decode(run) for run in runs if run]


def text(tokenizer: Any, examples: Examples, row: int = 0) -> str:
    return str(tokenizer.decode(examples.tokens[row].tolist()))


def test_answers_are_those_of_a_rendering_by_hand(tokenizer: Any) -> None:
    plain = chat_task(tokenizer, [TALK], [TALK], 200).train
    assert text(tokenizer, plain) == "[user] hi\n[assistant] yes sir\n[user] so?\n[assistant] no\n"
    assert answers(tokenizer, plain) == ["yes sir\n", "no\n"]
    tokenizer.chat_template = IM
    marked = chat_task(tokenizer, [TALK], [TALK], 200).train
    turns = (
        "<|im|>system\nBe kind.",
        "<|im|>user\nhi",
        "<|im|>assistant\nyes sir",
        "<|im|>user\nso?",
        "<|im|>assistant\nno",
    )
    assert text(tokenizer, marked) == "<|end|>\n".join(turns) + "<|end|>"
    assert answers(tokenizer, marked) == ["yes sir<|end|>", "no<|end|>"]  # the end token is learned, the line break not
    assert marked.target_count == len("yes sir") + len("no") + 2
    start = len(turns[0]) + len(turns[1]) + len("<|im|>assistant\n") + 2 * 2  # two turns closed by <|end|> and \n
    assert (marked.targets[0] != IGNORED).nonzero()[0].item() == start


def test_prompt_and_completion_with_and_without_a_template(tokenizer: Any) -> None:
    pair = Conversation((("user", "one two"), ("assistant", " three")), True)
    rendered = chat_task(tokenizer, [pair], [pair], 200).train
    assert text(tokenizer, rendered) == "[user] one two\n[assistant]  three\n"
    tokenizer.chat_template = None
    plain = chat_task(tokenizer, [pair], [pair], 200).train
    assert plain.tokens.tolist() == [[*tokenizer("one two three")["input_ids"], tokenizer.eos_token_id]]
    assert answers(tokenizer, plain) == [" three<|end|>"]
    with pytest.raises(ConfigError, match="no chat template"):
        chat_task(tokenizer, [TALK], [TALK], 200)


def test_long_conversations_are_cut_after_an_answer_or_dropped(tokenizer: Any) -> None:
    short = Conversation((("user", "a"), ("assistant", "b")))
    first = len("[user] hi\n[assistant] yes sir\n")
    data = chat_task(tokenizer, [TALK, short], [short, TALK], first)
    assert data.dropped == 0
    assert text(tokenizer, data.train).startswith("[user] hi\n[assistant] yes sir\n")
    assert answers(tokenizer, data.train) == ["yes sir\n"]
    data = chat_task(tokenizer, [TALK, short], [short, TALK], first - 1)
    assert (data.dropped, len(data.train), len(data.held_out)) == (2, 1, 1)
    with pytest.raises(ConfigError, match="none of 1 conversations to measure on has an answer within 25 tokens"):
        chat_task(tokenizer, [TALK, short], [TALK], 25)


def test_a_token_over_the_border_counts_as_answer(tokenizer: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    joined = Tokenizer(models.BPE(vocab={**vocabulary, ":Ġ": 256, ":ĠĠ": 257}, merges=[(":", "Ġ"), (":Ġ", "Ġ")]))
    joined.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=joined)
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}.{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    talk = Conversation((("user", "a"), ("assistant", " b")))
    row = chat_task(fast, [talk], [talk], 100).train
    assert row.targets[0][row.targets[0] != IGNORED].tolist() == [257, vocabulary["b"], vocabulary["."]]


def test_templates_without_a_fixed_place_for_answers_are_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = (  # only the last answer is shown with its thoughts
        "{% for m in messages %}[{{ m['role'] }}] {% if loop.last and m['role'] == 'assistant' %}<t></t>{% endif %}"
        "{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    with pytest.raises(ConfigError, match=r"x line 3: .* renders message 2 differently"):
        chat_task(tokenizer, [Conversation(TALK.messages, where="x line 3")], [TALK], 200)
    one = Conversation(TALK.messages[:2])
    assert answers(tokenizer, chat_task(tokenizer, [one], [one], 200).train) == ["<t></t>yes sir\n"]
    tokenizer.chat_template = "{{ raise_exception('roles must take turns') }}"
    with pytest.raises(ConfigError, match=r"x line 3: .* fails \(roles must take turns\)"):
        chat_task(tokenizer, [Conversation(TALK.messages, where="x line 3")], [TALK], 200)


def test_conversations_without_an_answer_are_refused() -> None:
    with pytest.raises(ConfigError, match="no message of the assistant"):
        Conversation((("user", "hi"),))
    with pytest.raises(ConfigError, match="first message is the assistant"):
        Conversation((("assistant", "hi"),))
