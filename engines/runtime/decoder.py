"""The decoder interface that every runtime implements, and the position bookkeeping they share."""

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
    """A loaded decoder with its KV caches: `prefill` starts sequences, `decode` continues them."""

    io: DecoderIO

    @property
    def capacity(self) -> int:
        """Largest number of positions of a sequence, prompt included."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Positions filled so far, int64 [B]."""

    def set_lora(self, tensors: LoraTensors | None) -> None:
        """Bind the contract's tensors (float32, cast here); None binds zeros, which equals the base bit for bit."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Start new sequences and return the logits after each prompt, float32 [B, V]."""

    def decode(self, tokens: Sequence[int | None]) -> NDArray[np.float32]:
        """Append one token to each sequence (None skips it) and return the logits after it, float32 [B, V]."""


class CachedDecoder(ABC):
    """A decoder that tracks the lengths of its sequences.

    Args:
        io: inputs and outputs of the graph.
        contract: its LoRA inputs; None for a graph without LoRA.
        batch: sequences per step.
        slots: KV cache slots per sequence.
        chunk: largest number of prompt tokens per sequence in one call; None runs every prompt in one call.
    """

    configuration = ""
    """Hash of the configuration of the graph's weights; empty if unknown."""
    strict_lora = False
    """Whether to refuse a LoRA that was emitted for another configuration; otherwise warn in one line."""

    def __init__(
        self, io: DecoderIO, contract: LoraContract | None, batch: int, slots: int, chunk: int | None = None
    ) -> None:
        self.io, self.contract, self.batch = io, contract, batch
        self.capacity = min(slots, io.max_positions)
        self.chunk, self._dtype = chunk, np.dtype(io.activations)
        self._lengths = np.zeros(batch, np.int64)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Positions filled so far, int64 [B]."""
        return self._lengths.copy()

    def set_lora(self, tensors: LoraTensors | None) -> None:
        """Bind the contract's tensors (float32, cast here); None binds zeros.

        Raises:
            ConfigError: the tensors do not match the contract, or `strict_lora` and they belong to another
                configuration.
        """
        if tensors is not None:
            self._check_lora(tensors)
        self._take_lora(tensors)

    def _check_lora(self, tensors: LoraTensors) -> str:
        """Return the configuration hash that a LoRA names; if it names none, the decoder's own.

        Raises:
            ConfigError: see `set_lora`.
        """
        check_lora(self.contract, tensors)
        configuration: str = getattr(tensors, "configuration", self.configuration)
        check_configuration(configuration, self.configuration, strict=self.strict_lora)
        return configuration

    def _take_lora(self, tensors: LoraTensors | None) -> None:
        if self.contract is None:
            return
        zeros = {name: np.zeros(shape, self._dtype) for name, shape in self.contract.inputs.items()}
        for name, value in (zeros if tensors is None else self.contract.graph_inputs(tensors, self._dtype)).items():
            self._bind(name, value)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Start new sequences and return the logits after each prompt, float32 [B, V].

        Raises:
            ConfigError: the number of prompts is not the batch size, or the graph cannot run one of them.
        """
        self._check(prompts, 0)
        lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        tokens = np.zeros((self.batch, lengths.max()), np.int64)  # padded on the right
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        chunk = self.chunk or tokens.shape[1]
        result = np.zeros((self.batch, self.io.vocabulary), np.float32)
        for start in range(0, tokens.shape[1], chunk):
            part = tokens[:, start : start + chunk]
            last = lengths - 1 - start
            index = np.clip(last, 0, part.shape[1] - 1)[:, None]
            logits = self.run(part, np.full(self.batch, start, np.int64), index)
            ends = (0 <= last) & (last < part.shape[1])
            result[ends] = logits[ends, 0]
        self._lengths = lengths
        return result

    def decode(self, tokens: Sequence[int | None]) -> NDArray[np.float32]:
        """Append one token to each sequence (None skips it) and return the logits after it, float32 [B, V].

        A skipped sequence still runs in the batch, with a dummy token that is not counted. The dummy is written to the
        first free slot, which the next token overwrites, or to the last slot of a full sequence, which no later token
        reads.

        Raises:
            ConfigError: the number of tokens is not the batch size, a token is unknown, or a cache is full.
        """
        skip = np.array([token is None for token in tokens], bool)
        rows = [[0 if token is None else token] for token in tokens]
        filled = int(self._lengths[~skip].max(initial=0)) if len(tokens) == self.batch else 0
        self._check(rows, filled)
        starts = np.minimum(self._lengths, self.capacity - 1)
        logits = self.run(np.array(rows, np.int64), starts, np.zeros((self.batch, 1), np.int64))
        self._lengths = self._lengths + ~skip
        return logits[:, 0]

    def _check(self, prompts: Sequence[Sequence[int]], filled: int) -> None:
        """Refuse what the graph cannot run: a wrong batch, no tokens, an unknown token, or too many positions."""
        if len(prompts) != self.batch:
            raise ConfigError(f"got {len(prompts)} sequences for a decoder of batch {self.batch}; give {self.batch}")
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise ConfigError("empty prompt; give at least one token per sequence")
        longest = filled + max(len(prompt) for prompt in prompts)
        if longest > self.capacity:
            raise ConfigError(f"{longest} positions needed, the decoder has {self.capacity}: {self._limit}")
        for token in (max(map(max, prompts)), min(map(min, prompts))):
            if not 0 <= token < self.io.vocabulary:
                raise ConfigError(
                    f"token id {token} is outside the vocabulary of {self.io.vocabulary}; use the bundle's tokenizer"
                )

    @property
    def _limit(self) -> str:
        """What sets the capacity, and what to do about it."""
        if self.io.cache_length or self.capacity == self.io.max_positions:
            return "the bundle was built for that context; shorten the prompt, or build with a longer --context"
        return "it was loaded with that context; shorten the prompt, or load it with a longer --context"

    def _bind(self, name: str, value: NDArray[Any]) -> None:
        """Bind `value` to the graph input `name`; only decoders with one buffer per input implement it."""
        raise NotImplementedError

    @abstractmethod
    def run(
        self, tokens: NDArray[np.int64], starts: NDArray[np.int64], index: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Run the graph once: tokens [B, S] from positions `starts` [B]; return logits [B, T, V] at `index` [B, T].

        This does not change `lengths`; `prefill` and `decode` do.
        """

    def _inputs(
        self, tokens: NDArray[np.int64], starts: NDArray[np.int64], index: NDArray[np.int64]
    ) -> dict[str, NDArray[np.int64]]:
        """Return the graph's inputs. Padding may run past the rotary table: it is clamped, and attention masks it."""
        positions = starts[:, None] + np.arange(tokens.shape[1])
        return {
            "input_ids": tokens,
            "position_ids": np.minimum(positions, self.io.max_positions - 1),
            "write_index": starts,
            "logits_index": index,
        }


def check_configuration(lora: str, weights: str, *, strict: bool = False) -> None:
    """Warn in one line if a LoRA was emitted for another configuration than that of the weights.

    Args:
        lora: configuration hash that the LoRA was emitted for; empty if it names none.
        weights: configuration hash of the weights; empty if unknown, which skips the check.
        strict: raise instead of warning.

    Raises:
        ConfigError: the configurations differ and `strict` is set.
    """
    if not weights or lora == weights:
        return
    origin = f"was emitted for configuration {lora}" if lora else "names no configuration"
    line = f"the LoRA {origin}, but the weights have {weights}; emit a LoRA for {weights} (coatrt adapt)"
    if strict:
        raise ConfigError(line)
    warn_once(line)


def check_lora(contract: LoraContract | None, tensors: LoraTensors) -> None:
    """Refuse LoRA tensors that do not match the contract.

    Raises:
        ConfigError: the graph has no LoRA inputs, or a tensor is missing, unknown or of another shape.
    """
    if contract is None:
        raise ConfigError("the graph has no LoRA inputs; export it with an adapter")
    if set(tensors) != set(contract.shapes):
        wrong = sorted(set(tensors) ^ set(contract.shapes))
        names = wrong[0] if len(wrong) == 1 else f"{wrong[0]} and {len(wrong) - 1} more tensors"
        raise ConfigError(f"the LoRA and its contract differ in {names}; emit it again")
    for name, shape in contract.shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise ConfigError(
                f"{name} has shape {tuple(tensors[name].shape)}, the contract says {shape}; emit it again"
            )
