"""What every runtime offers, and the bookkeeping of positions they share."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from coatrt.configs.lora_contract import DecoderIO, LoraContract
from coatrt.errors import ConfigError

__all__ = ["Decoder", "LoraTensors", "check_lora", "check_tokens", "next_step", "pad_right"]

LoraTensors = Mapping[str, NDArray[np.float32]]


class Decoder(Protocol):
    """A loaded decoder with its caches: `prefill` starts sequences, `decode` continues them."""

    io: DecoderIO

    @property
    def capacity(self) -> int:
        """Most positions of a sequence, prompt included."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Positions filled so far, int64 [B]."""

    def set_lora(self, tensors: LoraTensors | None) -> None:
        """Bind the tensors of the contract (float32, cast here); None: zeros, which equal the base bit for bit."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Start new sequences and return the logits after each prompt, float32 [B, V]."""

    def decode(self, tokens: Sequence[int | None]) -> NDArray[np.float32]:
        """Add one token to each sequence, where not None, and return the logits after it, float32 [B, V]."""


def pad_right(prompts: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return prompts as one array int64 [B, S], zeros at the right, and their lengths int64 [B]."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int64)
    tokens = np.zeros((len(prompts), int(lengths.max(initial=1))), np.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


def check_tokens(prompts: Sequence[Sequence[int]], io: DecoderIO, batch: int, filled: int, capacity: int) -> None:
    """Refuse what a graph cannot run: another batch, nothing, an unknown token, or more positions than there are.

    Raises:
        ConfigError: one of these.
    """
    if len(prompts) != batch:
        raise ConfigError(f"{len(prompts)} sequences are given to a decoder of batch {batch}; give as many")
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ConfigError("an empty prompt or batch is given; give at least one token per sequence")
    longest = filled + max(len(prompt) for prompt in prompts)
    if longest > capacity:
        raise ConfigError(
            f"{longest} positions are needed and the decoder has {capacity}; shorten, or build with --context"
        )
    worst = max((max(prompt) for prompt in prompts), default=0)
    if worst >= io.vocabulary or min(min(prompt) for prompt in prompts) < 0:
        raise ConfigError(f"token id {worst} is outside the vocabulary of {io.vocabulary}; use the bundle's tokenizer")


def next_step(
    tokens: Sequence[int | None], io: DecoderIO, lengths: NDArray[np.int64], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return what a step of decoding feeds, int64 [B, 1], the slots it writes and the lengths after it, int64 [B].

    A sequence that gets None rests: what it computes goes to its first free slot, or to its last where it has none, and
    is not counted. The next token overwrites the one, and a full sequence has no next token that would see the other.

    Raises:
        ConfigError: another number of tokens than sequences, an unknown token, or a full cache.
    """
    rests = np.array([token is None for token in tokens], bool)
    fed = [[0 if token is None else token] for token in tokens]
    filled = int(lengths[~rests].max(initial=0)) if len(tokens) == len(lengths) else 0
    check_tokens(fed, io, len(lengths), filled, capacity)
    return np.array(fed, np.int64), np.minimum(lengths, capacity - 1), lengths + ~rests


def check_lora(contract: LoraContract | None, tensors: LoraTensors) -> None:
    """Refuse LoRA tensors that are not those of the contract.

    Raises:
        ConfigError: a graph without LoRA, a tensor missing, unknown, or of another shape.
    """
    if contract is None:
        raise ConfigError("the graph has no LoRA inputs; export it with an adapter")
    if set(tensors) != set(contract.shapes):
        wrong = sorted(set(tensors) ^ set(contract.shapes))
        raise ConfigError(f"the LoRA and its contract differ in {len(wrong)} tensors, like {wrong[0]}; emit it again")
    for name, shape in contract.shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise ConfigError(
                f"{name} has shape {tuple(tensors[name].shape)}, the contract says {shape}; emit it again"
            )
