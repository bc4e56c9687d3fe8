"""/v1/completions: tokens, text, ends, choices, usage, log probabilities."""

import itertools
from typing import Any

import numpy as np
import pytest

from support.openai_servers import Server
from support.reference import Reference

PROMPT = "the cat sat"


def test_greedy_text_is_that_of_the_decoder(client: Any, model: str, reference: Reference) -> None:
    ids = reference.encode(PROMPT)
    expected = reference.greedy(ids, 24)
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-") and answer.model == model
    (choice,) = answer.choices
    assert choice.index == 0 and choice.logprobs is None
    assert choice.text == reference.decode(expected.tokens)
    assert choice.finish_reason == ("stop" if expected.ended else "length")
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == len(expected.tokens)
    assert answer.usage.total_tokens == len(ids) + len(expected.tokens)
    assert 0 <= answer.usage.prompt_tokens_details.cached_tokens <= len(ids)


def test_sixteen_tokens_by_default(server: Server) -> None:
    answer = server.complete(PROMPT, temperature=0, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"
    assert set(answer) == {"id", "object", "created", "model", "choices", "usage"}
    assert set(answer["choices"][0]) == {"index", "text", "logprobs", "finish_reason"}


def test_a_prompt_of_token_ids(client: Any, model: str, reference: Reference) -> None:
    ids = reference.encode(PROMPT)
    answer = client.completions.create(model=model, prompt=ids, max_tokens=8, temperature=0)
    assert answer.choices[0].text == reference.decode(reference.greedy(ids, 8).tokens)
    assert answer.usage.prompt_tokens == len(ids)


@pytest.mark.parametrize("as_ids", [False, True])
def test_several_prompts(client: Any, model: str, reference: Reference, as_ids: bool) -> None:
    prompts = ["the cat sat", "an owl", "where is the dog"]
    ids = [reference.encode(prompt) for prompt in prompts]
    answer = client.completions.create(model=model, prompt=ids if as_ids else prompts, max_tokens=9, temperature=0, n=2)
    expected = [reference.decode(reference.greedy(row, 9).tokens) for row in ids for _ in range(2)]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage.prompt_tokens == sum(map(len, ids))


def test_null_stands_for_the_default(server: Server) -> None:
    nulls = dict.fromkeys(
        ("top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "seed")
    )
    more = dict.fromkeys(("n", "stop", "ignore_eos", "stream", "stream_options", "configuration", "user", "logprobs"))
    plain = server.complete(PROMPT, temperature=0, max_tokens=8)
    assert server.complete(PROMPT, temperature=0, max_tokens=8, **nulls, **more)["choices"] == plain["choices"]


def test_logit_bias_forces_and_forbids(server: Server, reference: Reference) -> None:
    ids = reference.encode(PROMPT)
    first = reference.greedy(ids, 1).tokens[0]
    wanted = next(token for token in reference.encode("zebra") if token != first)

    def forbid(logits: Any, _: list[int]) -> Any:
        logits[first] -= 100
        return logits

    forced = server.complete(PROMPT, temperature=0, max_tokens=5, logit_bias={str(wanted): 100})
    assert forced["choices"][0]["text"] == reference.decode([wanted] * 5)
    forbidden = server.complete(PROMPT, temperature=0, max_tokens=12, logit_bias={str(first): -100})
    assert forbidden["choices"][0]["text"] == reference.decode(reference.greedy(ids, 12, edit=forbid).tokens)


def test_the_end_token_ends_and_is_not_shown(server: Server, reference: Reference) -> None:
    end = min(reference.stop)
    answer = server.complete(PROMPT, temperature=0, max_tokens=5, logit_bias={str(end): 100}, logprobs=1)
    assert answer["choices"][0]["text"] == ""
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["logprobs"]["tokens"] == []
    assert answer["usage"]["completion_tokens"] == 0
    on = server.complete(PROMPT, temperature=0, max_tokens=5, logit_bias={str(end): 100}, ignore_eos=True)
    assert on["choices"][0]["finish_reason"] == "length" and on["usage"]["completion_tokens"] == 5


def test_logprobs_are_those_of_the_model(client: Any, model: str, reference: Reference) -> None:
    ids = reference.encode(PROMPT)
    expected = reference.greedy(ids, 10)
    answer = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=10, temperature=0, logprobs=3, presence_penalty=0.0
    )
    found = answer.choices[0].logprobs
    chosen = [row[token] for row, token in zip(expected.logprobs, expected.tokens, strict=True)]
    assert np.allclose(found.token_logprobs, chosen, atol=2e-3)
    assert len(found.tokens) == len(found.top_logprobs) == len(found.text_offset) == len(expected.tokens)
    for row, token, top in zip(expected.logprobs, found.tokens, found.top_logprobs, strict=True):
        assert token in top and len(top) <= 3
        values = sorted(top.values(), reverse=True)
        assert np.allclose(values, np.sort(row)[::-1][: len(values)], atol=2e-3)


def test_logprobs_ignore_temperature_bias_and_penalties(server: Server, reference: Reference) -> None:
    ids = reference.encode(PROMPT)
    wanted = reference.encode("zebra")[0]
    row = reference.greedy(ids, 1).logprobs[0]
    answer = server.complete(
        PROMPT, max_tokens=1, temperature=0.5, logit_bias={str(wanted): 100}, logprobs=2, repetition_penalty=2, top_k=5
    )
    found = answer["choices"][0]["logprobs"]
    assert found["tokens"] == [reference.decode([wanted])]
    assert abs(found["token_logprobs"][0] - row[wanted]) < 2e-3
    assert len(found["top_logprobs"][0]) == 3  # two likeliest, and the chosen one


def test_logprobs_zero_has_no_alternatives(server: Server) -> None:
    found = server.complete(PROMPT, max_tokens=4, temperature=0, logprobs=0, ignore_eos=True)["choices"][0]["logprobs"]
    assert found["top_logprobs"] is None and len(found["token_logprobs"]) == 4
    assert set(found) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}


def test_text_offsets_cut_the_text_into_its_tokens(server: Server) -> None:
    choice = server.complete(PROMPT, max_tokens=12, temperature=0, logprobs=1)["choices"][0]
    offsets = [*choice["logprobs"]["text_offset"], len(choice["text"])]
    pieces = [choice["text"][a:b] for a, b in itertools.pairwise(offsets)]
    assert offsets[0] == 0 and offsets == sorted(offsets)
    assert "".join(pieces) == choice["text"]


def test_incomplete_characters_end_as_replacement_characters(server: Server, reference: Reference) -> None:
    """Tokens that are single bytes of characters; the first byte of "é" alone at the end."""
    first, *rest = reference.encode("é", special=False)
    if not rest:
        pytest.skip("the tokenizer has a token for this character")
    answer = server.complete(PROMPT, max_tokens=3, temperature=0, logit_bias={str(first): 100})
    assert answer["choices"][0]["text"] == reference.decode([first] * 3)
    assert answer["choices"][0]["text"].endswith("\ufffd")


def test_prompts_with_special_tokens_and_all_of_unicode(server: Server, reference: Reference) -> None:
    for prompt in ("naïve 日本語 🙂\u0000\n", "a<|end|>b", " "):
        ids = reference.encode(prompt)
        answer = server.complete(prompt, max_tokens=4, temperature=0)
        assert answer["usage"]["prompt_tokens"] == len(ids)
        assert answer["choices"][0]["text"] == reference.decode(reference.greedy(ids, 4).tokens)


def test_the_context_can_be_filled_to_the_last_token(server: Server, reference: Reference) -> None:
    ids = (reference.encode("the cat sat on the mat. ") * reference.context)[: reference.context - 6]
    answer = server.complete(ids, max_tokens=6, temperature=0, ignore_eos=True)
    assert answer["usage"]["total_tokens"] == reference.context
    assert answer["choices"][0]["text"] == reference.decode(reference.greedy(ids, 6, past_end=True).tokens)


def test_a_prefix_of_an_earlier_request_changes_nothing(server: Server, reference: Reference) -> None:
    """The second request begins like the first; the third goes on where the first ended."""
    ids = reference.encode("the cat sat on the mat. the dog sat on the mat. " * 2)
    first = reference.greedy(ids, 8).tokens
    for prompt in (ids, ids[:-5] + reference.encode("owl"), ids + first, ids):
        answer = server.complete(prompt, max_tokens=8, temperature=0)
        assert answer["choices"][0]["text"] == reference.decode(reference.greedy(prompt, 8).tokens)
