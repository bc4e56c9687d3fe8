"""Text generation over any runtime: greedy or sampled, one prompt or a batch of unequal ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from coatrt.data.chat_template import Refusal, Rendering, chat_template
from coatrt.data.encoding import encode
from coatrt.engines.runtime.decoder import Decoder
from coatrt.errors import BundleError, ConfigError

__all__ = ["Generated", "Sampling", "encode_prompt", "generate", "next_token"]

_MOST_SEED = 2**64 - 1


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 takes the likeliest token; else logits are divided by it.
        top_k: only so many likeliest tokens; 0 for all.
        top_p: only the likeliest tokens that make up this probability.
        seed: of the draws; every row of a batch has draws of its own.

    Raises:
        ConfigError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature {self.temperature} is given; give 0 or a positive number")
        if self.top_k < 0:
            raise ConfigError(f"top-k {self.top_k} is given; give 0 (all) or a positive number")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top-p {self.top_p} is given; give more than 0, at most 1")
        if not 0 <= self.seed <= _MOST_SEED:
            raise ConfigError(f"seed {self.seed} is given; give 0 or a positive number, at most {_MOST_SEED}")


@dataclass(frozen=True)
class Generated:
    """What one prompt was continued with.

    Args:
        tokens: without the stop token.
        reason: "stop" for a stop token, "length" for the limit.
    """

    tokens: tuple[int, ...]
    reason: Literal["stop", "length"]


def probabilities(logits: NDArray[np.float32], sampling: Sampling) -> NDArray[np.float64]:
    """Return the distribution the next token is drawn from, float64 [V]: temperature, then top-k, then top-p."""
    with np.errstate(over="ignore"):  # near temperature 0 all but the likeliest go to minus infinity
        scaled = (logits.astype(np.float64) - float(logits.max())) / sampling.temperature
    if 0 < sampling.top_k < len(scaled):
        scaled[np.argpartition(scaled, -sampling.top_k)[: -sampling.top_k]] = -np.inf
    weights: NDArray[np.float64] = np.exp(scaled - scaled.max())
    weights /= weights.sum()
    if sampling.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        weights[order[before >= sampling.top_p]] = 0
        weights /= weights.sum()
    return weights


def next_token(logits: NDArray[np.float32], sampling: Sampling, rng: np.random.Generator) -> int:
    """Return the next token for logits float32 [V].

    Raises:
        BundleError: the largest of them is not finite, or one is no number.
    """
    if not np.isfinite(logits.max()):
        raise BundleError(
            "the logits are not finite: weights or LoRA are damaged, or too large for the graph's activations; check "
            "the bundle (coatrt verify), or run without the LoRA (--no-lora)"
        )
    if sampling.temperature == 0:
        return int(logits.argmax())
    return int(rng.choice(len(logits), p=probabilities(logits, sampling)))


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[int] = (),
    on_token: Callable[[int, int], None] | None = None,
) -> list[Generated]:
    """Continue prompts, each until its own end.

    Args:
        decoder: with its LoRA bound.
        prompts: token ids, as many as the decoder's batch.
        max_tokens: most tokens per prompt; the decoder's capacity is the other limit.
        sampling: greedy by default.
        stop: tokens that end a sequence.
        on_token: called with (row, token) as soon as a token exists.

    Raises:
        ConfigError: the prompts do not fit the decoder, or `max_tokens` is not positive.
    """
    if max_tokens < 1:
        raise ConfigError(f"{max_tokens} tokens are asked for; ask for at least 1")
    sampling, stops = sampling or Sampling(), set(stop)
    draws = [np.random.default_rng([sampling.seed, row]) for row in range(len(prompts))]
    made: list[list[int]] = [[] for _ in prompts]
    reasons: list[Literal["stop", "length"] | None] = [None] * len(prompts)
    logits = decoder.prefill(prompts)
    while True:
        feed: list[int | None] = [None] * len(made)
        for row, tokens in enumerate(made):
            if reasons[row] is not None:
                continue
            token = next_token(logits[row], sampling, draws[row])
            if token in stops:
                reasons[row] = "stop"
                continue
            tokens.append(token)
            if on_token is not None:
                on_token(row, token)
            if len(tokens) >= max_tokens or int(decoder.lengths[row]) >= decoder.capacity:
                reasons[row] = "length"
            else:
                feed[row] = token
        if all(reason is not None for reason in reasons):
            break
        logits = decoder.decode(feed)
    return [Generated(tuple(tokens), reason or "length") for tokens, reason in zip(made, reasons, strict=True)]


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool = False, system: str | None = None) -> list[int]:
    """Return the token ids of a prompt.

    Args:
        tokenizer: a transformers tokenizer.
        prompt: the text.
        chat: apply the tokenizer's chat template, the prompt being the user's turn.
        system: the system message of a chat.

    Raises:
        ConfigError: the tokenizer has no chat template, its template refuses the turns, or the prompt is empty.
    """
    if chat:
        template = chat_template(tokenizer)
        if template is None:
            raise ConfigError("the model's tokenizer has no chat template; run without --chat")
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": prompt})
        (text,) = template.render([Rendering(turns, prompt=True)])
        if isinstance(text, Refusal):
            hint = "run without --system, or without --chat" if system else "run without --chat"
            raise ConfigError(f"the chat template of {template.place} refuses the prompt ({text.reason}); {hint}")
        (ids,) = encode(tokenizer, [text])
    else:
        (ids,) = encode(tokenizer, [prompt], special_tokens=True)
    if not ids:
        raise ConfigError("the prompt has no tokens; give some text")
    return ids
