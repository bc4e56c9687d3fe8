"""Streams: chunks, their order and their sum, usage, [DONE]."""

from typing import Any

import pytest

from support.openai_servers import Server

PROMPT = "the cat sat"


def test_chunks_of_completions_add_up(client: Any, model: str, server: Server) -> None:
    whole = server.complete(PROMPT, max_tokens=20, temperature=0)["choices"][0]
    stream = client.completions.create(model=model, prompt=PROMPT, max_tokens=20, temperature=0, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole["text"]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == whole["finish_reason"]
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    assert chunks[0].object == "text_completion" and chunks[0].id.startswith("cmpl-")
    assert len(chunks) > 3


def test_chunks_of_chats_add_up(client: Any, model: str, server: Server) -> None:
    whole = server.chat("the cat", max_tokens=20, temperature=0)["choices"][0]
    messages = [{"role": "user", "content": "the cat"}]
    chunks = list(
        client.chat.completions.create(model=model, messages=messages, max_tokens=20, temperature=0, stream=True)
    )
    assert chunks[0].object == "chat.completion.chunk" and chunks[0].id.startswith("chatcmpl-")
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole["message"]["content"]
    assert chunks[-1].choices[0].finish_reason == whole["finish_reason"]
    assert chunks[-1].choices[0].delta.content is None
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_usage_comes_last_if_wanted(server: Server, path: str) -> None:
    body: dict[str, Any] = {"model": server.model, "max_tokens": 6, "temperature": 0, "stream": True}
    body |= {"prompt": PROMPT} if path == "/v1/completions" else {"messages": [{"role": "user", "content": PROMPT}]}
    plain = list(server.events(path, body))
    assert plain[-1] == "[DONE]" and all("usage" not in event for event in plain[:-1])
    events = list(server.events(path, {**body, "stream_options": {"include_usage": True}}))
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"] == [] and all(event["usage"] is None for event in events[:-2])
    whole = server.post(path, {key: value for key, value in body.items() if key != "stream"}).json()["usage"]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert events[-2]["usage"][name] == whole[name]


def test_several_choices_in_one_stream(server: Server) -> None:
    fields = {"max_tokens": 10, "temperature": 1.2, "seed": 5, "n": 3}
    whole = [choice["text"] for choice in server.complete([PROMPT, "an owl"], **fields)["choices"]]
    body = {"model": server.model, "prompt": [PROMPT, "an owl"], "stream": True, **fields}
    texts, reasons = [""] * 6, [0] * 6
    for event in list(server.events("/v1/completions", body))[:-1]:
        (choice,) = event["choices"]
        assert reasons[choice["index"]] == 0  # nothing after the end
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] += choice["finish_reason"] is not None
    assert texts == whole and reasons == [1] * 6


def test_logprobs_of_completion_chunks_add_up(server: Server) -> None:
    fields = {"max_tokens": 12, "temperature": 0, "logprobs": 2}
    whole = server.complete(PROMPT, **fields)["choices"][0]["logprobs"]
    body = {"model": server.model, "prompt": PROMPT, "stream": True, **fields}
    parts = [event["choices"][0]["logprobs"] for event in list(server.events("/v1/completions", body))[:-1]]
    for name in ("tokens", "text_offset"):
        assert [value for part in parts if part for value in part[name]] == whole[name]
    values = [value for part in parts if part for value in part["token_logprobs"]]
    assert values == pytest.approx(whole["token_logprobs"], abs=2e-3)
    assert sum(len(part["top_logprobs"]) for part in parts if part) == len(whole["tokens"])


def test_logprobs_of_chat_chunks_add_up(server: Server) -> None:
    fields = {"max_tokens": 12, "temperature": 0, "logprobs": True, "top_logprobs": 1}
    whole = server.chat("the cat", **fields)["choices"][0]["logprobs"]["content"]
    messages = [{"role": "user", "content": "the cat"}]
    body = {"model": server.model, "messages": messages, "stream": True, **fields}
    parts = [event["choices"][0]["logprobs"] for event in list(server.events("/v1/chat/completions", body))[:-1]]
    assert [entry["token"] for part in parts if part for entry in part["content"]] == [e["token"] for e in whole]


def test_a_bad_request_for_a_stream_is_an_ordinary_error(server: Server) -> None:
    body = {"model": server.model, "prompt": PROMPT, "stream": True, "temperature": 9}
    assert server.refusal("/v1/completions", body)["param"] == "temperature"
