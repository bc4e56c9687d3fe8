"""Stop strings: where a text ends, and that no part of one is ever sent."""

from typing import Any

import pytest

from support.openai_servers import Server
from support.reference import Reference

PROMPT = "the cat sat"


@pytest.fixture(scope="module")
def text(reference: Reference) -> str:
    """The text of 24 greedy tokens; stop strings are cut out of it."""
    found = reference.decode(reference.greedy(reference.encode(PROMPT), 24, past_end=True).tokens)
    assert "\ufffd" not in found and len(found) >= 20
    return found


def streamed(server: Server, stop: Any, **fields: Any) -> tuple[str, str | None]:
    body = {"model": server.model, "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    pieces, reason = [], None
    for event in server.events("/v1/completions", {**body, "stop": stop, "stream": True, **fields}):
        if event != "[DONE]":
            pieces.append(event["choices"][0]["text"])
            reason = event["choices"][0]["finish_reason"] or reason
    return "".join(pieces), reason


@pytest.mark.parametrize("length", [1, 2, 5, 9])
def test_the_text_ends_before_the_stop_string(client: Any, server: Server, text: str, length: int) -> None:
    stop = text[8 : 8 + length]
    fields: dict[str, Any] = {"max_tokens": 24, "temperature": 0, "extra_body": {"ignore_eos": True}}
    answer = client.completions.create(model=server.model, prompt=PROMPT, stop=stop, **fields)
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens <= 24
    assert streamed(server, stop) == (text[: text.index(stop)], "stop")


def test_the_first_of_several_ends_it(server: Server, text: str) -> None:
    stops = [text[15:18], text[6:9], "not in it", text[11:13]]
    cut = min(text.index(stop) + len(stop) for stop in stops if stop in text)
    expected = min(
        (text[: text.index(stop)] for stop in stops if stop in text and text.index(stop) + len(stop) == cut), key=len
    )
    assert streamed(server, stops) == (expected, "stop")


def test_of_two_that_end_together_the_longer_counts(server: Server, text: str) -> None:
    longer = text[7:12]
    if longer[2:] in text[:11]:
        pytest.skip("the shorter one occurs before")
    assert streamed(server, [longer[2:], longer]) == (text[: text.index(longer)], "stop")


def test_what_only_begins_like_a_stop_string_is_shown_in_the_end(server: Server, text: str) -> None:
    assert streamed(server, [text[-4:] + "never"]) == (text, "length")
    assert streamed(server, [text[3:8] + "never", text[5:9] + "never"]) == (text, "length")


def test_a_stop_string_in_the_prompt_does_not_count(server: Server, text: str) -> None:
    assert "cat" not in text
    assert streamed(server, ["cat sat"])[1] == "length"


def test_logprobs_list_the_tokens_of_the_stop_string_too(server: Server, text: str) -> None:
    stop = text[8:12]
    fields = {"max_tokens": 24, "temperature": 0, "ignore_eos": True, "logprobs": 0, "stop": [stop]}
    answer = server.complete(PROMPT, **fields)
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == answer["usage"]["completion_tokens"]
    shown = "".join(answer["choices"][0]["logprobs"]["tokens"])
    assert shown.startswith(text[: text.index(stop) + len(stop)])


def test_each_choice_has_its_own_end(server: Server, reference: Reference) -> None:
    prompts = ["the cat sat", "an owl"]
    texts = [reference.decode(reference.greedy(reference.encode(p), 20, past_end=True).tokens) for p in prompts]
    stop = texts[0][5:9]
    answer = server.complete(prompts, max_tokens=20, temperature=0, ignore_eos=True, stop=stop)
    assert [choice["text"] for choice in answer["choices"]] == [t.partition(stop)[0] for t in texts]


def test_an_incomplete_character_is_held_back(server: Server, reference: Reference) -> None:
    ids = reference.encode("é", special=False)
    if len(ids) != 2:
        pytest.skip("the tokenizer has a token for this character")
    body = {"model": server.model, "prompt": PROMPT, "max_tokens": 2, "temperature": 0, "stream": True}
    bias = {str(ids[0]): 100, str(ids[1]): 60}  # the penalty makes 10 of 100 once the first one is there
    events = list(server.events("/v1/completions", {**body, "logit_bias": bias, "repetition_penalty": 10}))
    assert [event["choices"][0]["text"] for event in events[:-1] if event["choices"][0]["text"]] == ["é"]
