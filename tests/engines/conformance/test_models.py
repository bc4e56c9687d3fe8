"""Which weights and which LoRA answer, /v1/models, metrics."""

import re
from typing import Any

import pytest

from support.openai_servers import Server
from support.reference import Reference

PROMPT = "the cat sat"
CONFIGURATION = {"default": "int8"}


def test_models_are_listed(client: Any, model: str) -> None:
    models = {entry.id: entry for entry in client.models.list()}
    assert {model, f"{model}:base"} <= set(models)
    assert all(entry.object == "model" and entry.owned_by == "coatrt" for entry in models.values())
    assert client.models.retrieve(f"{model}:base") == models[f"{model}:base"]


def test_an_unknown_model(client: Any, model: str) -> None:
    import openai

    for name in ("nothing", f"{model}:nothing", ""):
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model=name, prompt="hi")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


def test_base_has_no_lora(client: Any, model: str, reference: Reference) -> None:
    ids = reference.encode(PROMPT)
    expected = {name: reference.decode(reference.greedy(ids, 12, lora=name).tokens) for name in ("own", "base")}
    assert expected["own"] != expected["base"]
    for name in ("own", "base", "own"):
        full = model if name == "own" else f"{model}:base"
        answer = client.completions.create(model=full, prompt=PROMPT, max_tokens=12, temperature=0)
        assert answer.model == full and answer.choices[0].text == expected[name]


def test_a_configuration_brings_its_lora(server: Server, reference: Reference) -> None:
    ids = reference.encode(PROMPT)
    row = reference.greedy(ids, 1, lora=CONFIGURATION).logprobs[0]
    own = reference.greedy(ids, 1).logprobs[0]
    answer = server.complete(PROMPT, max_tokens=1, temperature=0, logprobs=0, configuration=CONFIGURATION)
    found = answer["choices"][0]["logprobs"]["token_logprobs"][0]
    assert abs(found - row.max()) < 2e-3
    assert abs(found - own.max()) > 5e-3 or abs(row.max() - own.max()) < 5e-3
    again = server.complete(PROMPT, max_tokens=1, temperature=0, logprobs=0)
    assert abs(again["choices"][0]["logprobs"]["token_logprobs"][0] - own.max()) < 2e-3


def test_a_configuration_with_base_is_refused(server: Server) -> None:
    body = {"model": f"{server.model}:base", "prompt": "hi", "configuration": CONFIGURATION}
    assert server.refusal("/v1/completions", body)["param"] == "configuration"


def test_a_cache_is_not_shared_between_loras(server: Server, reference: Reference) -> None:
    prompt = "the dog sat on the mat. the fox sat on the mat."
    ids = reference.encode(prompt)
    for name, full in (("own", server.model), ("base", f"{server.model}:base"), ("own", server.model)):
        body = {"model": full, "prompt": prompt, "max_tokens": 10, "temperature": 0}
        answer = server.post("/v1/completions", body).json()
        assert answer["choices"][0]["text"] == reference.decode(reference.greedy(ids, 10, lora=name).tokens)


def test_metrics_count(server: Server) -> None:
    names = ("coatrt_tokens_total", "coatrt_prompt_tokens_total", "coatrt_requests_total")
    before = [server.metric(name) for name in names]
    usage = server.complete(PROMPT, max_tokens=7, temperature=0, ignore_eos=True)["usage"]
    server.refusal("/v1/completions", {"model": server.model})
    after = [server.metric(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [7, usage["prompt_tokens"], 2]
    text = server.http.get("/metrics").text
    assert re.search(r'coatrt_requests_total\{status="400"\} [0-9.]+', text)
    assert server.metric("coatrt_requests_running") == 0 and server.metric("coatrt_requests_waiting") == 0
    for name in ("coatrt_request_seconds", "coatrt_first_token_seconds"):
        assert server.metric(f"{name}_count") > 0
