"""Text generation with any decoder: greedy or sampled, one prompt or a batch of prompts of different lengths."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from coatrt.data.chat_template import Refusal, Rendering, chat_template
from coatrt.data.encoding import encode
from coatrt.engines.runtime.decoder import Decoder
from coatrt.errors import BundleError, ConfigError

__all__ = ["Generation", "Sampling", "encode_prompt", "generate", "next_token"]

_MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: sample from this many of the most likely tokens; 0 for all.
        top_p: sample from the most likely tokens whose probabilities add up to this.
        seed: seed of the random draws; every row of a batch has a generator of its own.

    Raises:
        ConfigError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be 0 or a positive number, got {self.temperature}")
        if self.top_k < 0:
            raise ConfigError(f"top-k must be 0 (all) or a positive number, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top-p must be more than 0 and at most 1, got {self.top_p}")
        if not 0 <= self.seed <= _MAX_SEED:
            raise ConfigError(f"seed must be at least 0 and at most {_MAX_SEED}, got {self.seed}")


@dataclass(frozen=True)
class Generation:
    """The continuation of one prompt.

    Args:
        tokens: the new tokens, without the stop token.
        reason: "stop" if a stop token or the caller ended it, "length" if a limit did.
    """

    tokens: tuple[int, ...]
    reason: Literal["stop", "length"]


def probabilities(logits: NDArray[np.float32], sampling: Sampling) -> NDArray[np.float64]:
    """Return the probabilities of the next token, float64 [V]: temperature, then top-k, then top-p."""
    with np.errstate(over="ignore"):  # near temperature 0 all but the most likely go to minus infinity
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
        BundleError: the largest logit is infinite, or one is NaN.
    """
    if not np.isfinite(logits.max()):
        raise BundleError(
            "the logits are not finite: weights or LoRA are damaged, or too large for the dtype of the activations; "
            "check the bundle (coatrt verify), or run without the LoRA (--no-lora)"
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
    on_token: Callable[[int, int], object] | None = None,
) -> list[Generation]:
    """Continue each prompt until its own end.

    Args:
        decoder: a decoder with its LoRA bound.
        prompts: token ids; as many prompts as the decoder's batch.
        max_tokens: largest number of new tokens per prompt; the decoder's capacity limits it too.
        sampling: how tokens are chosen; greedy by default.
        stop: tokens that end a sequence.
        on_token: called with (row, token) after each new token; a row ends where it returns False.

    Raises:
        ConfigError: the prompts do not fit the decoder, or `max_tokens` is below 1.
        BundleError: the logits are not finite.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}")
    sampling, stops = sampling or Sampling(), set(stop)
    generators = [np.random.default_rng([sampling.seed, row]) for row in range(len(prompts))]
    continuations: list[list[int]] = [[] for _ in prompts]
    reasons: list[Literal["stop", "length"] | None] = [None] * len(prompts)
    logits = decoder.prefill(prompts)
    while True:
        inputs: list[int | None] = [None] * len(continuations)
        for row, tokens in enumerate(continuations):
            if reasons[row] is not None:
                continue
            token = next_token(logits[row], sampling, generators[row])
            if token in stops:
                reasons[row] = "stop"
                continue
            tokens.append(token)
            if on_token is not None and on_token(row, token) is False:
                reasons[row] = "stop"
            elif len(tokens) >= max_tokens or int(decoder.lengths[row]) >= decoder.capacity:
                reasons[row] = "length"
            else:
                inputs[row] = token
        if all(reason is not None for reason in reasons):
            break
        logits = decoder.decode(inputs)
    return [
        Generation(tuple(tokens), reason or "length") for tokens, reason in zip(continuations, reasons, strict=True)
    ]


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool = False, system: str | None = None) -> list[int]:
    """Return the token ids of a prompt.

    Args:
        tokenizer: a transformers tokenizer.
        prompt: the text.
        chat: apply the tokenizer's chat template, with the prompt as the user's turn.
        system: the system message of a chat.

    Raises:
        ConfigError: the tokenizer has no chat template, the template refuses the turns, or the prompt is empty.
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
