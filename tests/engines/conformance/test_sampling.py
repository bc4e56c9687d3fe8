"""How tokens are chosen: penalties, temperature, top-k, top-p, min-p, seeds."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from support.openai_servers import Server
from support.reference import Reference

PROMPT = "the cat sat on the"


@pytest.mark.parametrize(
    "fields",
    [{"temperature": 1.5, "top_k": 1}, {"temperature": 1.5, "top_p": 1e-9}, {"temperature": 1.5, "min_p": 1}],
    ids=["top_k", "top_p", "min_p"],
)
def test_a_cut_to_one_token_is_greedy(server: Server, reference: Reference, fields: dict[str, Any]) -> None:
    ids = reference.encode(PROMPT)
    answer = server.complete(PROMPT, max_tokens=10, **fields)
    assert answer["choices"][0]["text"] == reference.decode(reference.greedy(ids, 10).tokens)


def test_repetition_penalty_counts_prompt_and_answer(server: Server, reference: Reference) -> None:
    ids = reference.encode(PROMPT)

    def edit(logits: NDArray[np.float64], tokens: list[int]) -> NDArray[np.float64]:
        seen = sorted({*ids, *tokens})
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.8, logits[seen] * 1.8)
        return logits

    answer = server.complete(PROMPT, max_tokens=12, temperature=0, repetition_penalty=1.8)
    expected = reference.greedy(ids, 12, edit=edit).tokens
    assert expected != reference.greedy(ids, 12).tokens
    assert answer["choices"][0]["text"] == reference.decode(expected)


@pytest.mark.parametrize(("frequency", "presence"), [(1.5, 0), (0, 2), (0.7, 1.1), (-1, -0.5)])
def test_frequency_and_presence_count_the_answer(
    server: Server, reference: Reference, frequency: float, presence: float
) -> None:
    ids = reference.encode(PROMPT)

    def edit(logits: NDArray[np.float64], tokens: list[int]) -> NDArray[np.float64]:
        for token, count in Counter(tokens).items():
            logits[token] -= frequency * count + presence
        return logits

    fields = {"frequency_penalty": frequency, "presence_penalty": presence}
    answer = server.complete(PROMPT, max_tokens=16, temperature=0, **fields)
    assert answer["choices"][0]["text"] == reference.decode(reference.greedy(ids, 16, edit=edit).tokens)


def test_bias_comes_before_penalties(server: Server, reference: Reference) -> None:
    """A bias makes the logit positive or negative, which decides how the repetition penalty acts."""
    ids = reference.encode(PROMPT)
    biased = ids[0]

    def edit(logits: NDArray[np.float64], tokens: list[int]) -> NDArray[np.float64]:
        logits[biased] += 30
        seen = sorted({*ids, *tokens})
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / 3, logits[seen] * 3)
        for token, count in Counter(tokens).items():
            logits[token] -= 2 * count
        return logits

    answer = server.complete(
        PROMPT, max_tokens=10, temperature=0, logit_bias={str(biased): 30}, repetition_penalty=3, frequency_penalty=2
    )
    assert answer["choices"][0]["text"] == reference.decode(reference.greedy(ids, 10, edit=edit).tokens)


def drawn(server: Server, prompt: list[int], seeds: int, **fields: Any) -> Counter[int]:
    """Return how often each first token was drawn: 16 choices for each seed; they are read by their log probability."""
    found: Counter[int] = Counter()
    for seed in range(seeds):
        answer = server.complete(prompt, max_tokens=1, n=16, seed=seed, logprobs=0, ignore_eos=True, **fields)
        found.update(round(choice["logprobs"]["token_logprobs"][0], 2) for choice in answer["choices"])
    return found


def kept(row: NDArray[np.float64], *, temperature: float, top_k: int, top_p: float, min_p: float) -> Any:
    """Return token → probability after all cuts, by a loop over the sorted tokens."""
    scaled = row / temperature
    order = sorted(range(len(row)), key=lambda token: (-scaled[token], token))[: top_k or None]
    weights = np.exp(scaled[order] - scaled[order[0]])
    weights /= weights.sum()
    total, count = 0.0, 0
    while count < len(order) and total < top_p:
        total += weights[count]
        count += 1
    chosen = [(token, weight) for token, weight in zip(order, weights, strict=True)][:count]
    chosen = [(token, weight) for token, weight in chosen if weight >= min_p * weights[0]]
    whole = sum(weight for _, weight in chosen)
    return {token: weight / whole for token, weight in chosen}


@pytest.mark.parametrize(
    "cuts",
    [
        {"temperature": 1.0, "top_k": 3, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 2.0, "top_k": 0, "top_p": 0.5, "min_p": 0.0},
        {"temperature": 1.7, "top_k": 0, "top_p": 1.0, "min_p": 0.3},
        {"temperature": 2.0, "top_k": 6, "top_p": 0.9, "min_p": 0.1},
    ],
    ids=["top_k", "top_p", "min_p", "all"],
)
def test_draws_follow_the_distribution(server: Server, reference: Reference, cuts: dict[str, Any]) -> None:
    ids = reference.encode(PROMPT)[:5]
    row = reference.greedy(ids, 1, past_end=True).logprobs[0]
    expected: Counter[float] = Counter()
    for token, weight in kept(row, **cuts).items():
        expected[round(float(row[token]), 2)] += weight
    found = drawn(server, ids, 16, **cuts)
    total = sum(found.values())
    for value in found:
        near = sum(weight for other, weight in expected.items() if abs(other - value) < 0.035)
        assert near > 0, (value, expected)
    for value, weight in expected.items():
        near = [other for other in {*found, *expected} if abs(other - value) < 0.035]
        weight = sum(expected[other] for other in near)
        count = sum(found[other] for other in near)
        deviation = (weight * (1 - weight) / total) ** 0.5
        assert abs(count / total - weight) <= 5 * deviation + 1e-9, (value, weight, count, total)


def test_an_equal_seed_gives_an_equal_answer(server: Server) -> None:
    fields = {"max_tokens": 20, "temperature": 1.5, "n": 3}
    first, again, other = (server.complete(PROMPT, seed=seed, **fields) for seed in (7, 7, 8))
    texts = [[choice["text"] for choice in answer["choices"]] for answer in (first, again, other)]
    assert texts[0] == texts[1] and texts[0] != texts[2]
    assert len(set(texts[0])) == 3  # each choice draws for itself
    assert len({answer["id"] for answer in (first, again, other)}) == 3


def test_without_a_seed_answers_differ(server: Server) -> None:
    texts = {server.complete(PROMPT, max_tokens=20, temperature=2)["choices"][0]["text"] for _ in range(3)}
    assert len(texts) > 1


def test_temperature_is_one_by_default(server: Server) -> None:
    fields = {"max_tokens": 20, "seed": 3}
    answers = [server.complete(PROMPT, **fields, **more)["choices"] for more in ({}, {"temperature": 1})]
    assert answers[0] == answers[1]
