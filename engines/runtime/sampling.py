"""How the next token is chosen; the order of the steps is that of docs/reference/openai-api.md."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coatrt.errors import BundleError, ConfigError

__all__ = ["Sampler", "Sampling", "largest", "log_probabilities", "next_token", "probabilities"]

_MAX_SEED = 2**64 - 1
_FIRST_TRY = 256  # likeliest tokens that are sorted first for top-p; they nearly always suffice


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: sample from this many of the most likely tokens; 0 for all.
        top_p: sample from the most likely tokens whose probabilities add up to this.
        seed: seed of the random draws; every row of a batch has a generator of its own.
        min_p: sample from the tokens at least this many times as likely as the most likely one.
        repetition_penalty: divides positive logits of tokens that occur in the prompt or the answer, and multiplies
            negative ones.
        presence_penalty: subtracted from the logits of tokens that occur in the answer.
        frequency_penalty: subtracted from the logits of tokens in the answer, times their number there.
        logit_bias: token id → number added to its logit, before all penalties.

    Raises:
        ConfigError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be 0 or a positive number, got {self.temperature}")
        if self.top_k < 0:
            raise ConfigError(f"top-k must be 0 (all) or a positive number, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top-p must be more than 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min-p must be at least 0 and at most 1, got {self.min_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ConfigError(f"the repetition penalty must be a positive number, got {self.repetition_penalty}")
        for name in ("presence", "frequency"):
            value = getattr(self, f"{name}_penalty")
            if not np.isfinite(value):
                raise ConfigError(f"the {name} penalty must be a finite number, got {value}")
        if not 0 <= self.seed <= _MAX_SEED:
            raise ConfigError(f"seed must be at least 0 and at most {_MAX_SEED}, got {self.seed}")


def largest(values: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Return the places of the `count` greatest values, the greatest first; of equal ones the lower places first."""
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    least = np.partition(values, -count)[-count]
    above, equal = np.flatnonzero(values > least), np.flatnonzero(values == least)
    chosen = np.sort(np.concatenate([above, equal[: count - len(above)]]))
    return chosen[np.argsort(-values[chosen], kind="stable")]


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the model's log probabilities, float64 [V], before anything that `Sampling` changes."""
    shifted: NDArray[np.float64] = logits.astype(np.float64) - float(logits.max())
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def probabilities(logits: NDArray[Any], sampling: Sampling) -> NDArray[np.float64]:
    """Return the probabilities of the next token, float64 [V]: temperature, then top-k, top-p and min-p."""
    with np.errstate(over="ignore"):  # near temperature 0 all but the most likely go to minus infinity
        scaled = (logits.astype(np.float64) - float(logits.max())) / sampling.temperature
    weights: NDArray[np.float64] = np.exp(scaled)
    if 0 < sampling.top_k < len(weights):
        weights = _only(weights, largest(scaled, sampling.top_k))
    weights /= weights.sum()
    if sampling.top_p < 1:
        count = _FIRST_TRY
        while True:
            order = largest(weights, count)
            sums = np.cumsum(weights[order])
            if count >= len(weights) or sums[-1] >= sampling.top_p:
                break
            count *= 8
        weights = _only(weights, order[sums - weights[order] < sampling.top_p])
    if sampling.min_p > 0:
        weights[weights < sampling.min_p * weights.max()] = 0
    weights /= weights.sum()
    return weights


def _only(weights: NDArray[np.float64], places: NDArray[np.int64]) -> NDArray[np.float64]:
    result = np.zeros_like(weights)
    result[places] = weights[places]
    return result


def next_token(logits: NDArray[Any], sampling: Sampling, rng: np.random.Generator) -> int:
    """Return the next token for logits [V], which already have bias and penalties.

    Raises:
        BundleError: the largest logit is infinite, or one is NaN.
    """
    if not np.isfinite(logits.max()):
        raise BundleError(
            "the logits are not finite: weights or LoRA are damaged, or too large for the dtype of the activations; "
            "check the bundle with coatrt verify"
        )
    if sampling.temperature == 0:
        return int(logits.argmax())
    sums = np.cumsum(probabilities(logits, sampling))
    return int(np.searchsorted(sums / sums[-1], rng.random(), side="right"))


class Sampler:
    """Chooses the tokens of one sequence.

    Args:
        sampling: how.
        prompt: its tokens, which count for the repetition penalty.
        index: number of the sequence; sequences with the same seed and different numbers draw differently.
    """

    def __init__(self, sampling: Sampling, prompt: Iterable[int] = (), index: int = 0) -> None:
        self.sampling = sampling
        self._rng = np.random.default_rng([sampling.seed, index])
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set()
        self._counts: Counter[int] = Counter()
        bias = sampling.logit_bias
        self._bias = np.array(list(bias), np.int64), np.array(list(bias.values()), np.float64)
        self._edits = bool(bias) or sampling.repetition_penalty != 1
        self._edits |= bool(sampling.presence_penalty or sampling.frequency_penalty)

    def next(self, logits: NDArray[np.float32]) -> int:
        """Return the next token for logits float32 [V], and count it.

        Raises:
            BundleError: the logits are not finite.
        """
        token = next_token(self._edited(logits) if self._edits else logits, self.sampling, self._rng)
        if self._edits:
            self._counts[token] += 1
            self._seen.add(token)
        return token

    def _edited(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the logits after bias and penalties."""
        values, sampling = logits.astype(np.float64), self.sampling
        tokens, bias = self._bias
        values[tokens] += bias
        if sampling.repetition_penalty != 1:
            seen = np.fromiter(self._seen, np.int64, len(self._seen))
            scores = values[seen]
            penalty = sampling.repetition_penalty
            values[seen] = np.where(scores > 0, scores / penalty, scores * penalty)
        if self._counts and (sampling.presence_penalty or sampling.frequency_penalty):
            tokens = np.fromiter(self._counts, np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float64, len(self._counts))
            values[tokens] -= sampling.frequency_penalty * counts + sampling.presence_penalty
        return values
