"""The steps from logits to a token, against loops over Python's numbers."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from coatrt.engines.runtime.sampling import Sampler, Sampling, largest, log_probabilities, next_token, probabilities
from coatrt.errors import BundleError, ConfigError


def cut(logits: list[float], sampling: Sampling) -> list[float]:
    """Return the probabilities that docs/reference/openai-api.md describes, by a loop."""
    scaled = [value / sampling.temperature for value in logits]
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))[: sampling.top_k or None]
    weights = {i: math.exp(scaled[i] - scaled[order[0]]) for i in order}
    total = math.fsum(weights.values())
    kept, before = [], 0.0
    for i in order:
        if before < sampling.top_p:
            kept.append(i)
        before += weights[i] / total
    kept = [i for i in kept if weights[i] >= sampling.min_p * weights[order[0]]]
    total = math.fsum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("size", [7, 3000])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"top_k": 5},
        {"top_p": 0.6},
        {"top_p": 0.999},
        {"min_p": 0.2},
        {"top_k": 6, "top_p": 0.8, "min_p": 0.05},
        {"top_k": 10**6},
    ],
    ids=str,
)
def test_the_cuts_keep_what_a_loop_keeps(size: int, fields: dict[str, Any]) -> None:
    rng = np.random.default_rng(size)
    for temperature in (0.4, 1.0, 2.5):
        sampling = Sampling(temperature, **fields)
        logits = np.round(rng.normal(0, 2, size), 1).astype(np.float32)  # rounded, so that many are equal
        expected = cut(logits.astype(float).tolist(), sampling)
        np.testing.assert_allclose(probabilities(logits, sampling), expected, atol=1e-12)


def test_the_largest_of_equal_values_are_the_first() -> None:
    values = np.array([1.0, 3.0, 3.0, 2.0, 3.0, 2.0])
    assert [largest(values, count).tolist() for count in (1, 2, 4, 5, 9)] == [
        [1],
        [1, 2],
        [1, 2, 4, 3],
        [1, 2, 4, 3, 5],
        [1, 2, 4, 3, 5, 0],
    ]


def test_log_probabilities_are_the_log_softmax() -> None:
    logits = np.array([1e4, 1e4 - 1, 0.0], np.float32)
    expected = [-math.log(1 + math.exp(-1)), -1 - math.log(1 + math.exp(-1)), -1e4 - math.log(1 + math.exp(-1))]
    np.testing.assert_allclose(log_probabilities(logits), expected)


def test_penalties_and_bias_in_their_order() -> None:
    """Greedy with a bias, then the repetition penalty, then frequency and presence."""
    rng = np.random.default_rng(0)
    sampling = Sampling(
        repetition_penalty=1.7, presence_penalty=0.4, frequency_penalty=0.3, logit_bias={2: 3.0, 5: -2.0}
    )
    prompt, tokens = [1, 2, 2], []
    sampler = Sampler(sampling, prompt)
    for _ in range(12):
        logits = rng.normal(0, 2, 8).astype(np.float32)
        values = logits.astype(float).tolist()
        values[2] += 3
        values[5] -= 2
        for token in {*prompt, *tokens}:
            values[token] = values[token] / 1.7 if values[token] > 0 else values[token] * 1.7
        for token, count in Counter(tokens).items():
            values[token] -= 0.3 * count + 0.4
        expected = values.index(max(values))
        assert sampler.next(logits) == expected
        tokens.append(expected)
    assert len(set(tokens)) > 2


def test_sequences_of_one_seed_draw_for_themselves() -> None:
    logits = np.zeros(1000, np.float32)
    sampling = Sampling(1.0, seed=5)
    drawn = [[sampler.next(logits) for _ in range(5)] for sampler in (Sampler(sampling, (), i) for i in (0, 0, 1))]
    assert drawn[0] == drawn[1] != drawn[2]


def test_tokens_without_probability_are_never_drawn() -> None:
    logits = np.array([0, -np.inf, 0, -np.inf], np.float32)
    rng = np.random.default_rng(0)
    assert {next_token(logits, Sampling(1.0), rng) for _ in range(200)} == {0, 2}
    with pytest.raises(BundleError, match="not finite"):
        Sampler(Sampling(1.0, repetition_penalty=2), [0]).next(np.array([0, np.nan], np.float32))


@pytest.mark.parametrize(
    "wrong",
    [{"min_p": -0.1}, {"min_p": 1.1}, {"repetition_penalty": 0}, {"presence_penalty": math.inf}],
    ids=str,
)
def test_values_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"must be"):
        Sampling(**wrong)
