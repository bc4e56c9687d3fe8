"""/v1/chat/completions: templates, messages, log probabilities."""

from typing import Any

import numpy as np
import pytest

from support.openai_servers import Server
from support.reference import Reference

TURNS = [("system", "be brief"), ("user", "the cat"), ("assistant", "sat"), ("user", "where?")]


def messages(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def test_a_conversation_goes_through_the_template(client: Any, model: str, reference: Reference) -> None:
    ids = reference.chat(*TURNS)
    expected = reference.greedy(ids, 16)
    answer = client.chat.completions.create(model=model, messages=messages(*TURNS), max_tokens=16, temperature=0)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-") and answer.model == model
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == reference.decode(expected.tokens)
    assert answer.choices[0].finish_reason == ("stop" if expected.ended else "length")
    assert answer.choices[0].logprobs is None
    assert answer.usage.prompt_tokens == len(ids)


def test_without_max_tokens_it_runs_to_the_end_of_the_context(server: Server, reference: Reference) -> None:
    room = 12
    content = "a" * 10_000
    while len(reference.chat(("user", content))) > reference.context - room:
        over = len(reference.chat(("user", content))) - (reference.context - room)
        content = content[: -max(1, over // 2)] if over < 64 else content[: len(content) * 9 // 10]
    answer = server.chat(content, temperature=0, ignore_eos=True)
    assert answer["usage"]["total_tokens"] == reference.context
    assert answer["choices"][0]["finish_reason"] == "length"


def test_max_completion_tokens_is_another_name(server: Server) -> None:
    answers = [server.chat("hi", temperature=0, **{name: 5}) for name in ("max_tokens", "max_completion_tokens")]
    assert answers[0]["choices"] == answers[1]["choices"]


def test_developer_is_the_system_and_parts_are_joined(server: Server) -> None:
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    asked = [
        messages(("system", "be brief"), ("user", "the cat")),
        messages(("developer", "be brief"), ("user", parts)),
    ]
    fields = {"model": server.model, "temperature": 0, "max_tokens": 8}
    answers = [server.post("/v1/chat/completions", {**fields, "messages": m}).json() for m in asked]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["usage"]["prompt_tokens"] == answers[1]["usage"]["prompt_tokens"]


def test_chat_logprobs(client: Any, model: str, reference: Reference) -> None:
    expected = reference.greedy(reference.chat(("user", "the cat")), 8)
    answer = client.chat.completions.create(
        model=model,
        messages=messages(("user", "the cat")),
        max_tokens=8,
        temperature=0,
        logprobs=True,
        top_logprobs=4,
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == len(expected.tokens)
    for row, token, entry in zip(expected.logprobs, expected.tokens, content, strict=True):
        assert abs(entry.logprob - row[token]) < 2e-3
        assert len(entry.top_logprobs) == 4
        assert np.allclose([top.logprob for top in entry.top_logprobs], np.sort(row)[::-1][:4], atol=2e-3)
        assert entry.top_logprobs[0].token == entry.token  # greedy
    joined = b"".join(bytes(entry.bytes) for entry in content)
    assert joined.decode(errors="replace") == answer.choices[0].message.content


def test_chat_logprobs_without_alternatives(server: Server) -> None:
    entries = server.chat("hi", max_tokens=3, temperature=0, logprobs=True)["choices"][0]["logprobs"]["content"]
    for entry in entries:
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"} and entry["top_logprobs"] == []


def test_bytes_of_incomplete_characters_are_exact(server: Server, reference: Reference) -> None:
    ids = reference.encode("é", special=False)
    if len(ids) != 2:
        pytest.skip("the tokenizer has a token for this character")
    fields = {"max_tokens": 1, "temperature": 0, "logprobs": True}
    for token, value in zip(ids, "é".encode(), strict=True):
        choice = server.chat("hi", logit_bias={str(token): 100}, **fields)["choices"][0]
        assert choice["logprobs"]["content"][0]["bytes"] == [value]
        assert choice["logprobs"]["content"][0]["token"] == "\ufffd"


def test_several_choices(client: Any, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=messages(("user", "hi")), max_tokens=12, temperature=1.5, n=4, seed=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.message.content for choice in answer.choices}) == 4


@pytest.mark.parametrize(
    "bad",
    [
        [],
        "hi",
        [{"role": "user"}],
        [{"role": "nobody", "content": "hi"}],
        [{"role": "user", "content": 1}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": "hi", "name": "x"}],
        ["hi"],
    ],
    ids=str,
)
def test_bad_messages_are_refused(server: Server, bad: Any) -> None:
    error = server.refusal("/v1/chat/completions", {"model": server.model, "messages": bad, "max_tokens": 2})
    assert error["param"] is not None and error["param"].startswith("messages")


def test_conversations_with_special_tokens(server: Server, reference: Reference) -> None:
    answer = server.chat("a<|end|>é🙂", max_tokens=4, temperature=0)
    assert answer["usage"]["prompt_tokens"] == len(reference.chat(("user", "a<|end|>é🙂")))
