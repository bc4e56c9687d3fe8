"""What is refused, with which status, and in OpenAI's form."""

from typing import Any

import pytest

from support.openai_servers import Server
from support.reference import Reference

BAD: list[tuple[str, Any]] = [
    *[("temperature", value) for value in (-0.1, 2.1, "1", True, [1])],
    *[("top_p", value) for value in (0, 1.01, -1, "0.5")],
    *[("top_k", value) for value in (-1, 1.5, 1_000_001, "4", True)],
    *[("min_p", value) for value in (-0.1, 1.1, "0")],
    *[("presence_penalty", value) for value in (-2.1, 2.1, "0")],
    *[("frequency_penalty", value) for value in (-2.1, 2.1, {})],
    *[("repetition_penalty", value) for value in (0, -1, 10.5, "1")],
    *[("logit_bias", value) for value in ({"x": 1}, {"5": 101}, {"5": "1"}, {"99999999": 1}, {"-1": 1})],
    *[("logit_bias", value) for value in ([5], {"5": None}, "x")],
    *[("seed", value) for value in (-1, 2**63, 1.5, "1", True)],
    *[("n", value) for value in (0, 17, -1, 1.0, "2", True)],
    *[("stop", value) for value in ("", [""], [1], ["a"] * 17, "a" * 257, 5, {})],
    *[("ignore_eos", value) for value in (1, "true")],
    *[("max_tokens", value) for value in (0, -1, 1.5, "5", True)],
    *[("stream", value) for value in (1, "true", [])],
    *[("stream_options", value) for value in ({"include_usage": True}, [], "x")],
    *[("configuration", value) for value in (5, {}, {"default": "int9"}, {"nothing": "int8"}, "int8")],
    *[("user", value) for value in (5, {})],
    *[("model", value) for value in (5, None, [])],
]


@pytest.mark.parametrize(("field", "value"), BAD, ids=lambda value: str(value)[:24])
def test_bad_values_are_refused_by_both_endpoints(server: Server, field: str, value: Any) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    ):
        error = server.refusal(path, {"model": server.model, **body, field: value})
        assert error["type"] == "invalid_request_error"
        assert error["param"] is not None and error["param"].startswith(field), error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("logprobs", value) for value in (-1, 21, True, "1", 1.0)],
        *[("prompt", value) for value in ("", [], [[]], [""], 5, [5, "a"], [-1], [10**9], [True], [["a"]], ["a"] * 17)],
    ],
    ids=lambda value: str(value)[:24],
)
def test_bad_values_of_completions(server: Server, field: str, value: Any) -> None:
    error = server.refusal("/v1/completions", {"model": server.model, "prompt": "hi", field: value})
    assert error["param"] is not None and error["param"].startswith(field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("logprobs", value) for value in (1, "true")],
        *[("top_logprobs", value) for value in (-1, 21, 5, "1")],  # 5: without logprobs
        *[("max_completion_tokens", value) for value in (0, "1")],
    ],
    ids=lambda value: str(value)[:24],
)
def test_bad_values_of_chats(server: Server, field: str, value: Any) -> None:
    body = {"model": server.model, "messages": [{"role": "user", "content": "hi"}], field: value}
    assert server.refusal("/v1/chat/completions", body)["param"] == field


@pytest.mark.parametrize("value", [1, None])
def test_an_unknown_field_is_refused_by_name(server: Server, value: Any) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "hi", "best_of": value}),
        ("/v1/completions", {"prompt": "hi", "messages": value}),
        ("/v1/completions", {"prompt": "hi", "top_logprobs": value}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "tools": value}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "prompt": value}),
    ):
        error = server.refusal(path, {"model": server.model, **body})
        assert error["param"] == list(body)[1] and list(body)[1] in error["message"]
        assert "temperature" in error["message"]  # the known ones are listed


def test_the_clients_error_is_that_of_openai(client: Any, model: str) -> None:
    import openai

    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=model, prompt="hi", temperature=5)
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nothing", prompt="hi")
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.AuthenticationError) as unknown:
        client.with_options(api_key="another").completions.create(model=model, prompt="hi")
    assert unknown.value.code == "invalid_api_key"


@pytest.mark.parametrize("missing", ["model", "prompt"])
def test_required_fields(server: Server, missing: str) -> None:
    body = {"model": server.model, "prompt": "hi"}
    del body[missing]
    assert server.refusal("/v1/completions", body)["param"] == missing


def test_messages_are_required(server: Server) -> None:
    assert server.refusal("/v1/chat/completions", {"model": server.model})["param"] == "messages"


def test_both_names_of_max_tokens_are_refused(server: Server) -> None:
    body = {"model": server.model, "messages": [{"role": "user", "content": "hi"}]}
    error = server.refusal("/v1/chat/completions", {**body, "max_tokens": 3, "max_completion_tokens": 3})
    assert error["param"] == "max_completion_tokens"


def test_choices_of_all_prompts_together_are_limited(server: Server) -> None:
    assert server.refusal("/v1/completions", {"model": server.model, "prompt": ["a"] * 5, "n": 4})["param"] == "n"


def test_what_does_not_fit_the_context(server: Server, reference: Reference) -> None:
    ids = (reference.encode("the cat sat. ") * reference.context)[: reference.context]
    for prompt, count in ((ids, 1), (ids[:-4], 5), (ids[:4], reference.context)):
        error = server.refusal("/v1/completions", {"model": server.model, "prompt": prompt, "max_tokens": count})
        assert error["code"] == "context_length_exceeded"
        assert str(reference.context) in error["message"]
    chat = {"model": server.model, "messages": [{"role": "user", "content": "the cat sat. " * reference.context}]}
    assert server.refusal("/v1/chat/completions", chat)["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "body",
    [
        *[b"", b"{", b"[]", b'"text"', b"null", b'{"model": "a"} x', b'{"prompt": NaN}', b"\xff\xfe", b"{'a': 1}"],
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "\xff"}',
        b"[" * 100_000,
        b'{"prompt": ' + b"[" * 40 + b"]" * 40 + b"}",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_what_is_no_json_object(server: Server, body: bytes) -> None:
    response = server.post("/v1/completions", body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_nested_key_that_occurs_twice(server: Server) -> None:
    body = f'{{"model": "{server.model}", "prompt": "a", "logit_bias": {{"5": 1, "5": 2}}}}'.encode()
    assert server.post("/v1/completions", body).status_code == 400


def test_a_body_that_is_too_large(server: Server) -> None:
    body = b'{"model": "x", "prompt": "' + b"a" * (1 << 20) + b'"}'
    response = server.post("/v1/completions", body)
    assert response.status_code == 413
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_another_content_type(server: Server) -> None:
    response = server.post("/v1/completions", {"model": server.model}, headers={"Content-Type": "text/plain"})
    assert response.status_code == 415 and response.json()["error"]["type"] == "invalid_request_error"


def test_a_content_type_with_a_character_set(server: Server) -> None:
    body = {"model": server.model, "prompt": "a", "max_tokens": 1}
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert server.post("/v1/completions", body, headers=headers).status_code == 200


def test_paths_and_methods(server: Server) -> None:
    for path in ("/v1/nothing", "/v1/embeddings", "/v2/completions"):
        response = server.post(path, {})
        assert response.status_code == 404 and response.json()["error"]["type"] == "invalid_request_error"
    response = server.http.get("/v1/completions")
    assert response.status_code == 405 and response.headers["allow"] == "POST"
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert server.post("/v1/models", {}).status_code == 405


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "Basic abc", "wrong", "Bearer wröng"])
def test_the_key_is_needed_below_v1_only(server: Server, header: str | None) -> None:
    headers = {"Authorization": header.encode("latin-1")} if header is not None else {}
    import httpx2

    with httpx2.Client(base_url=server.url, headers=headers) as http:
        for response in (http.get("/v1/models"), http.post("/v1/completions", json={"model": server.model})):
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/metrics").status_code == 200
