"""What every runtime offers, and the bookkeeping of positions they share."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from coatrt.configs.lora_contract import DecoderIO, LoraContract
from coatrt.errors import ConfigError
from coatrt.system.notices import warn_once

__all__ = ["CachedDecoder", "Decoder", "LoraTensors", "check_configuration", "check_lora"]

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


class CachedDecoder(ABC):
    """A decoder that keeps the positions of its sequences.

    Args:
        io: inputs and outputs of the graph.
        contract: its LoRA inputs; None where it has none.
        batch: sequences at once.
        slots: of the KV cache per sequence.
        piece: most tokens per sequence in one call; None takes every prompt whole.
    """

    configuration = ""
    """Hash of the configuration of the graph's weights; empty where it is not known."""
    strict_lora = False
    """Whether a LoRA that says to be of another configuration is refused; else that is said in one line."""

    def __init__(
        self, io: DecoderIO, contract: LoraContract | None, batch: int, slots: int, piece: int | None = None
    ) -> None:
        self.io, self.contract, self.batch = io, contract, batch
        self.capacity = min(slots, io.max_positions)
        self._piece, self._dtype = piece, np.dtype(io.activations)
        self._lengths = np.zeros(batch, np.int64)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Positions filled so far, int64 [B]."""
        return self._lengths.copy()

    def set_lora(self, tensors: LoraTensors | None) -> None:
        """Bind the tensors of the contract (float32, cast here); None: zeros.

        Raises:
            ConfigError: they are not those of the contract, or of another configuration under `strict_lora`.
        """
        if tensors is not None:
            self._check_lora(tensors)
        self._take_lora(tensors)

    def _check_lora(self, tensors: LoraTensors) -> str:
        """Return the configuration that a LoRA names, the decoder's where it names none.

        Raises:
            ConfigError: see `set_lora`.
        """
        check_lora(self.contract, tensors)
        emitted: str = getattr(tensors, "configuration", self.configuration)
        check_configuration(emitted, self.configuration, strict=self.strict_lora)
        return emitted

    def _take_lora(self, tensors: LoraTensors | None) -> None:
        if self.contract is None:
            return
        zeros = {name: np.zeros(shape, self._dtype) for name, shape in self.contract.inputs.items()}
        for name, value in (zeros if tensors is None else self.contract.graph_inputs(tensors, self._dtype)).items():
            self._bind(name, value)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Start new sequences and return the logits after each prompt, float32 [B, V].

        Raises:
            ConfigError: another number of prompts than the batch, or prompts the graph cannot run.
        """
        self._check(prompts, 0)
        lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        tokens = np.zeros((self.batch, lengths.max()), np.int64)  # padded at the right
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        piece = self._piece or tokens.shape[1]
        result = np.zeros((self.batch, self.io.vocabulary), np.float32)
        for start in range(0, tokens.shape[1], piece):
            part = tokens[:, start : start + piece]
            last = lengths - 1 - start
            index = np.clip(last, 0, part.shape[1] - 1)[:, None]
            logits = self.run(part, np.full(self.batch, start, np.int64), index)
            ends = (0 <= last) & (last < part.shape[1])
            result[ends] = logits[ends, 0]
        self._lengths = lengths
        return result

    def decode(self, tokens: Sequence[int | None]) -> NDArray[np.float32]:
        """Add one token to each sequence, where not None, and return the logits after it, float32 [B, V].

        A sequence that gets None rests: what it computes goes to its first free slot, or to its last where it has none,
        and is not counted. The next token overwrites the one, and a full sequence has no next token that would see the
        other.

        Raises:
            ConfigError: another number of tokens than sequences, an unknown token, or a full cache.
        """
        rests = np.array([token is None for token in tokens], bool)
        fed = [[0 if token is None else token] for token in tokens]
        filled = int(self._lengths[~rests].max(initial=0)) if len(tokens) == self.batch else 0
        self._check(fed, filled)
        starts = np.minimum(self._lengths, self.capacity - 1)
        logits = self.run(np.array(fed, np.int64), starts, np.zeros((self.batch, 1), np.int64))
        self._lengths = self._lengths + ~rests
        return logits[:, 0]

    def _check(self, prompts: Sequence[Sequence[int]], filled: int) -> None:
        """Refuse what the graph cannot run: another batch, nothing, an unknown token, or more positions than it has."""
        if len(prompts) != self.batch:
            raise ConfigError(f"{len(prompts)} sequences are given to a decoder of batch {self.batch}; give as many")
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise ConfigError("an empty prompt or batch is given; give at least one token per sequence")
        longest = filled + max(len(prompt) for prompt in prompts)
        if longest > self.capacity:
            raise ConfigError(f"{longest} positions are needed and the decoder has {self.capacity}, {self._limit}")
        worst = max(max(prompt) for prompt in prompts)
        if worst >= self.io.vocabulary or min(min(prompt) for prompt in prompts) < 0:
            raise ConfigError(
                f"token id {worst} is outside the vocabulary of {self.io.vocabulary}; use the bundle's tokenizer"
            )

    @property
    def _limit(self) -> str:
        """What sets the capacity, and what to do about it."""
        if self.io.cache_length or self.capacity == self.io.max_positions:
            return "as many as the bundle was built for; shorten, or build it with more (--context)"
        return "the context it was loaded with; shorten, or load it with more (--context)"

    def _bind(self, name: str, value: NDArray[Any]) -> None:
        """Make `value` the input `name` of the graph until another is bound; for decoders that bind one by one."""
        raise NotImplementedError

    @abstractmethod
    def run(
        self, tokens: NDArray[np.int64], starts: NDArray[np.int64], index: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Run the graph once: tokens [B, S] from positions `starts` [B]; return logits [B, T, V] at `index` [B, T].

        Positions filled are not counted: `prefill` and `decode` do.
        """

    def _inputs(
        self, tokens: NDArray[np.int64], starts: NDArray[np.int64], index: NDArray[np.int64]
    ) -> dict[str, NDArray[np.int64]]:
        """Return the graph's inputs; positions of padding may pass the rotary table, and what they write is masked."""
        positions = starts[:, None] + np.arange(tokens.shape[1])
        return {
            "input_ids": tokens,
            "position_ids": np.minimum(positions, self.io.max_positions - 1),
            "write_index": starts,
            "logits_index": index,
        }


def check_configuration(emitted: str, weights: str, *, strict: bool = False) -> None:
    """Say in one line that a LoRA makes up for the errors of another configuration than the weights'.

    Args:
        emitted: hash of the configuration it was emitted for; empty where it names none.
        weights: hash of theirs; empty where it is not known, and then nothing is said.
        strict: refuse it.

    Raises:
        ConfigError: it is of another, and `strict`.
    """
    if not weights or emitted == weights:
        return
    said = f"was emitted for configuration {emitted}" if emitted else "names no configuration"
    line = f"the LoRA {said}, the weights are of {weights} and stay so; emit it for theirs (coatrt adapt)"
    if strict:
        raise ConfigError(line)
    warn_once(line)


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
