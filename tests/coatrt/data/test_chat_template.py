"""Chat templates: what transformers renders, and one reason for everything that a template can do instead."""

import gc
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from coatrt.data import chat_template as module
from coatrt.data.chat_template import ChatTemplate, Refusal, Rendering, chat_template
from coatrt.engines.runtime.generate import encode_prompt
from coatrt.errors import ConfigError
from coatrt.models.tokenizer import load_tokenizer

MESSAGES = [{"role": "user", "content": "hï\ud83d"}]


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(tiny_llama)


def test_renderings_are_those_of_transformers(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{{ eos_token }}{% for m in messages -%}\n  <{{ m.role }}>{{ m.content | trim }}{% if m.x %}{{ m | tojson }}"
        "{% endif %}{% generation %}{{ loop.index }}{% endgeneration %}{% if loop.index > 3 %}{% break %}{% endif %}"
        "{% endfor %}{% if tools %}{{ tools | tojson(indent=1) }}{% endif %}{% if add_generation_prompt %}>{% endif %}"
    )
    template = chat_template(tokenizer)
    assert template is not None
    messages = [{"role": "user", "content": " é "}, {"role": "tool", "content": "b", "x": {"y": [1, None]}}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    wanted = [Rendering(messages), Rendering(messages, tools), Rendering(messages[:1], prompt=True)]
    assert template.render(wanted) == [
        tokenizer.apply_chat_template(
            list(r.messages), list(r.tools) or None, add_generation_prompt=r.prompt, tokenize=False
        )
        for r in wanted
    ]
    assert chat_template(tokenizer) is template  # one process for all


@pytest.mark.parametrize(
    ("source", "reason"),
    {
        "{{ 1 / 0 }}": "ZeroDivisionError: division by zero",
        "{% for i in range(10 ** 9) %}{% endfor %}": "OverflowError: Range too big",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}": "it calls itself without end",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "it does not end within 1 s",
        "{{ 10 ** (10 ** 9) }}": "it does not end within 1 s",
        "{{ 'a' * 10 ** 10 }}": "it takes too much memory|it does not end",
        "{{ 'a' * 17000000 }}": "it writes more than 16777216 characters|it does not end",
        "{% if %}": "TemplateSyntaxError: Expected an expression",
        "{{ raise_exception('roles\nmust alternate') }}": "roles must alternate",
        "{{ messages[0].nothing.more }}": "UndefinedError",
        "{" * 100000: "it calls itself without end",
    }.items(),
    ids=lambda text: text[:30],
)
def test_whatever_a_template_does_is_one_reason_in_little_time(
    source: str, reason: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SECONDS", 1.0)
    started = time.monotonic()
    (found,) = ChatTemplate(source, "{}", "here").render([Rendering(MESSAGES)])
    assert time.monotonic() - started < 15
    assert isinstance(found, Refusal)
    assert any(part in found.reason for part in reason.split("|")), found
    assert "\n" not in found.reason


def test_a_template_that_was_stopped_can_be_asked_again_and_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECONDS", 2.0)
    before = {child.pid for child in psutil.Process().children()}
    template = ChatTemplate(
        "{% if messages[0].slow %}{{ 10 ** messages[0].slow }}{% endif %}{{ messages[0].content }}", "{}", ""
    )
    slow, quick = Rendering([{**MESSAGES[0], "slow": 10**9}]), Rendering(MESSAGES)
    assert template.render([quick]) == ["hï\ud83d"]
    assert all(isinstance(found, Refusal) for found in template.render([quick, slow]))
    assert template.render([quick]) == ["hï\ud83d"]
    del template
    gc.collect()
    assert {child.pid for child in psutil.Process().children()} <= before


def test_what_is_no_template_is_one_line(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer.chat_template = {"rag": "x"}
    with pytest.raises(ConfigError, match=r"cannot be used .*multiple chat templates"):
        chat_template(tokenizer)
    tokenizer.chat_template = 7
    with pytest.raises(ConfigError, match="must be a text, got int"):
        chat_template(tokenizer)
    tokenizer.chat_template = "{{ 1 / 0 }}"
    with pytest.raises(
        ConfigError, match=r"the chat template of .*llama/chat_template.jinja refuses the prompt \(ZeroDivisionError"
    ):
        encode_prompt(tokenizer, "hi", chat=True)
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(ConfigError, match="cannot start a process for chat templates"):
        ChatTemplate("x", "{}", "").render([Rendering(MESSAGES)])


def test_a_tokenizer_that_fails_is_one_line(tokenizer: Any) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    broken = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="?")))
    with pytest.raises(ConfigError, match=r"the tokenizer of .* fails .*WordLevel"):
        encode_prompt(broken, "b")
    with pytest.raises(ConfigError, match=r"the tokenizer of .*llama fails \(ValueError"):
        encode_prompt(tokenizer, 5)  # type: ignore[arg-type]
