"""Lines of OpenAI's format for fine-tuning: every key is honoured, or refused by name with file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from coatrt.data.chat import chat_task
from coatrt.data.conversation import Conversation
from coatrt.data.examples import IGNORED
from coatrt.data.jsonl import Line
from coatrt.data.registry import load_task
from coatrt.errors import ConfigError
from coatrt.models.tokenizer import load_tokenizer

USER, YES = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
CALL = {"id": "c1", "type": "function", "function": {"name": "sum", "arguments": '{"b": 1, "a": 2}'}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "3"}
TOOLS = [{"type": "function", "function": {"name": "sum", "parameters": {}}}]
TEMPLATE = (  # with tools and calls, without names and ids, and what is said beside calls is left out
    "{% if tools %}[tools] {{ tools | tojson }}\n{% endif %}{% for m in messages %}[{{ m.role }}] "
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments | tojson }})"
    "{% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(tiny_llama)


def conversation(*messages: dict[str, Any], **keys: Any) -> Conversation:
    return Conversation.from_line(Line("x.jsonl line 7", {"messages": list(messages), **keys}))


def learned(tokenizer: Any, *messages: dict[str, Any], **keys: Any) -> list[str]:
    """Return the answers that are trained on."""
    one = conversation(*messages, **keys)
    row = chat_task(tokenizer, [one], [one], 2000).train.targets[0].tolist()
    text = "".join("\x00" if target == IGNORED else tokenizer.decode([target]) for target in row)
    return [part for part in text.split("\x00") if part]


def test_an_answer_of_weight_0_is_read_and_not_learned(tokenizer: Any) -> None:
    no = {"role": "assistant", "content": "no", "weight": 0}
    assert learned(tokenizer, USER, no, USER, {**YES, "weight": 1}) == ["yes\n"]
    assert learned(tokenizer, USER, YES, USER, no) == ["yes\n"]
    with pytest.raises(ConfigError, match=r"x\.jsonl line 7 has no message of the assistant with weight 1"):
        conversation(USER, no)
    for weight in (2, -1, 0.5, True, "1", [1]):
        with pytest.raises(ConfigError, match=r"line 7: weight must be 0 or 1, got"):
            conversation(USER, {**YES, "weight": weight})
    with pytest.raises(ConfigError, match="message 1 of role user has a weight"):
        conversation({**USER, "weight": 1}, YES)


def test_tools_and_calls_reach_the_template(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    found = learned(tokenizer, USER, CALLS, RESULT, YES, tools=TOOLS)
    assert found == ['sum({"b": 1, "a": 2})', "yes"]
    one = conversation(USER, CALLS, RESULT, YES, tools=TOOLS)
    text = tokenizer.decode(chat_task(tokenizer, [one], [one], 2000).train.tokens[0].tolist())
    assert text.startswith('[tools] [{"type": "function", "function": {"name": "sum", "parameters": {}}}]\n[user] hi')
    assert "[tool] 3[assistant] yes" in text
    objects = {**CALLS, "tool_calls": [{"function": {"name": "sum", "arguments": {"b": 1, "a": 2}}}]}
    assert learned(tokenizer, USER, objects, YES) == found


def test_what_the_template_leaves_out_is_refused_by_name(tokenizer: Any) -> None:
    line = (USER, CALLS, RESULT, YES)
    with pytest.raises(
        ConfigError,
        match=r"x.jsonl line 7: the chat template of .*llama/chat_template.jinja ignores tools; remove it",
    ):
        chat_task(tokenizer, [conversation(USER, YES, tools=TOOLS)], [], 2000)
    with pytest.raises(ConfigError, match="ignores tool_calls of message 2"):
        chat_task(tokenizer, [conversation(*line)], [], 2000)
    tokenizer.chat_template = TEMPLATE
    for messages, said in (
        (({**USER, "name": "Ann"}, YES), "name of message 1"),
        ((USER, {**YES, "refusal": "no"}), "refusal of message 2"),
        ((USER, {**YES, "function_call": {"name": "f", "arguments": "{}"}}), "function_call of message 2"),
        ((USER, {**CALLS, "content": "I call"}, RESULT, YES), "content of message 2"),
        ((USER, CALLS, {**RESULT, "tool_call_id": "c2"}, YES), "tool_call_id of message 3"),
        ((USER, RESULT, YES), "tool_call_id of message 2"),
    ):
        with pytest.raises(ConfigError, match=f"line 7: .* ignores {said}; remove"):
            chat_task(tokenizer, [conversation(*messages)], [], 2000)
    tokenizer.chat_template = "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.content }}{% endfor %}"
    with pytest.raises(ConfigError, match="ignores message 1 of role developer"):
        chat_task(tokenizer, [conversation({"role": "developer", "content": "Be kind."}, USER, YES)], [], 2000)


def test_null_is_absent_and_a_text_part_is_its_text() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": None}
    assert conversation(parts, {**YES, "refusal": None, "tool_calls": None}, tools=None) == conversation(USER, YES)


WRONG: dict[str, tuple[Any, str]] = {
    "key of the line": (
        {"messages": [USER, YES], "id": 3},
        "line 1 has the unknown key 'id'; allowed: messages, tools",
    ),
    "key of a message": ({"messages": [USER, {**YES, "wieght": 0}]}, "line 1 message 2 has the unknown key 'wieght'"),
    "key of a pair": ({"prompt": "a", "completion": "b", "weight": 0}, "line 1 has the unknown key 'weight'"),
    "parallel calls": ({"messages": [USER, YES], "parallel_tool_calls": False}, "has parallel_tool_calls, which no"),
    "two parts": (
        {"messages": [{**USER, "content": [{"type": "text", "text": "a"}] * 2}, YES]},
        "content must be a text or",
    ),
    "a picture": (
        {"messages": [{**USER, "content": [{"type": "image_url", "image_url": {}}]}, YES]},
        "content must be a text or",
    ),
    "key of a part": (
        {"messages": [{**USER, "content": [{"type": "text", "text": "a", "x": 1}]}, YES]},
        "content has the unknown key 'x'",
    ),
    "null content": ({"messages": [{**USER, "content": None}, YES]}, "a message without content"),
    "tools a text": ({"messages": [USER, YES], "tools": "sum"}, "tools must be a list of objects"),
    "calls an object": ({"messages": [USER, {**CALLS, "tool_calls": {}}]}, "tool_calls must be a list of calls"),
    "call of what": (
        {"messages": [USER, {**CALLS, "tool_calls": [{"id": "a"}]}]},
        "a call in tool_calls has no function",
    ),
    "arguments": (
        {"messages": [USER, {**CALLS, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "line 1: arguments is not JSON",
    ),
    "arguments a list": (
        {"messages": [USER, {**CALLS, "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}]},
        "the arguments of a call must be an object",
    ),
    "key of a choice": (
        {"prompt": "a", "choices": ["b", "c"], "answer": 0, "label": 1},
        "unknown key 'label'; allowed",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_line_cannot_mean_is_refused_by_name(case: str, tokenizer: Any, tmp_path: Path) -> None:
    line, said = WRONG[case]
    (tmp_path / "x.jsonl").write_text(json.dumps(line))
    with pytest.raises(ConfigError, match=r"x\.jsonl line 1") as caught:
        load_task("choice" if "choices" in line else "chat", [tmp_path / "x.jsonl"], tokenizer, 32)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
