"""Log-likelihoods of given tokens: in one pass where a decoder returns many logits, else one token after another."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coatrt.engines.runtime.decoder import CachedDecoder
from coatrt.engines.runtime.ort import OrtDecoder
from coatrt.errors import BundleError, ConfigError

__all__ = ["Likelihood", "Passage", "likelihoods"]


@dataclass(frozen=True)
class Passage:
    """Tokens of which the last ones are scored.

    Args:
        tokens: context and scored tokens, at least one of each.
        scored: how many at the end are scored.
    """

    tokens: tuple[int, ...]
    scored: int

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the decoder reads: all but the last token."""
        return self.tokens[:-1]

    @property
    def positions(self) -> range:
        """The inputs after which the scored tokens are predicted."""
        return range(len(self.tokens) - 1 - self.scored, len(self.tokens) - 1)


@dataclass(frozen=True)
class Likelihood:
    """How likely the scored tokens of a passage are.

    Args:
        log_probability: sum of the natural logarithms of their probabilities.
        greedy: whether each of them is the most likely token at its place.
    """

    log_probability: float
    greedy: bool


@dataclass
class _Row:
    """A sequence that the decoder reads, and the passages it serves: their inputs are prefixes of its inputs."""

    inputs: tuple[int, ...]
    passages: list[int]
    positions: list[int]


def likelihoods(
    decoder: CachedDecoder, passages: Sequence[Passage], done: Callable[[int], object] = lambda count: None
) -> list[Likelihood]:
    """Return the likelihood of each passage.

    Passages whose inputs are equal, or a prefix of another's, are computed once: of a question with answers of one
    token each, only the question is read. The longest come first, so that too little memory shows at once.

    Args:
        decoder: a decoder with its LoRA bound; its sequences are lost.
        passages: what to score.
        done: called after each batch with the number of passages it scored.

    Raises:
        ConfigError: a passage has no context, nothing to score, more tokens than the decoder has room for, or a token
            outside of the vocabulary.
        BundleError: the logits are not finite.
    """
    for passage in passages:
        _check(decoder, passage)
    step = _in_one_pass if isinstance(decoder, OrtDecoder) else _token_by_token
    results: list[Likelihood | None] = [None] * len(passages)
    every = _rows(passages)
    for begin in range(0, len(every), decoder.batch):
        rows = every[begin : begin + decoder.batch]
        for row, logits in zip(rows, step(decoder, rows), strict=True):
            found = {position: i for i, position in enumerate(row.positions)}
            for number in row.passages:
                passage = passages[number]
                chosen = logits[[found[position] for position in passage.positions]]
                results[number] = _likelihood(chosen, np.array(passage.tokens[-passage.scored :]))
        done(sum(len(row.passages) for row in rows))
    return [result for result in results if result is not None]


def _check(decoder: CachedDecoder, passage: Passage) -> None:
    tokens, vocabulary = passage.tokens, decoder.io.vocabulary
    if not 0 < passage.scored < len(tokens):
        raise ConfigError(f"{passage.scored} of {len(tokens)} tokens are to be scored; score one at least, and not all")
    if len(tokens) - 1 > decoder.capacity:
        raise ConfigError(
            f"a passage of {len(tokens)} tokens is too long for {decoder.capacity} positions; shorten it, or load the "
            "decoder with a longer context"
        )
    if not (0 <= min(tokens) and max(tokens) < vocabulary):
        raise ConfigError(f"a token id is outside the vocabulary of {vocabulary}; use the bundle's tokenizer")


def _rows(passages: Sequence[Passage]) -> list[_Row]:
    """Return the sequences to read, the longest first.

    In lexicographic order everything between a prefix and its extension begins with the prefix too: it is enough to
    compare with the next.
    """
    rows: list[_Row] = []
    for number in sorted(range(len(passages)), key=lambda i: passages[i].inputs, reverse=True):
        inputs = passages[number].inputs
        if not (rows and rows[-1].inputs[: len(inputs)] == inputs):
            rows.append(_Row(inputs, [], []))
        rows[-1].passages.append(number)
    for row in rows:
        row.positions = sorted({position for number in row.passages for position in passages[number].positions})
    return sorted(rows, key=lambda row: -len(row.inputs))


def _in_one_pass(decoder: CachedDecoder, rows: Sequence[_Row]) -> Iterator[NDArray[np.float32]]:
    """Yield each row's logits at its positions, [T, V]; the rows of a batch are padded on the right."""
    width, most = max(len(row.inputs) for row in rows), max(len(row.positions) for row in rows)
    tokens = np.zeros((decoder.batch, width), np.int64)
    index = np.zeros((decoder.batch, most), np.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row.inputs)] = row.inputs
        index[i, : len(row.positions)] = row.positions
    logits = decoder.run(tokens, np.zeros(decoder.batch, np.int64), index)
    for i, row in enumerate(rows):
        yield logits[i, : len(row.positions)]


def _token_by_token(decoder: CachedDecoder, rows: Sequence[_Row]) -> list[NDArray[np.float32]]:
    """Return each row's logits at its positions, [T, V], as a service computes them: prefill, then decode."""
    firsts = [row.positions[0] for row in rows]
    idle = decoder.batch - len(rows)
    logits = decoder.prefill([*(row.inputs[: f + 1] for row, f in zip(rows, firsts, strict=True)), *[(0,)] * idle])
    found = [[logits[i]] for i in range(len(rows))]
    for number in range(1, max(len(row.inputs) - first for row, first in zip(rows, firsts, strict=True))):
        places = [first + number for first in firsts]
        tokens = [row.inputs[p] if p < len(row.inputs) else None for row, p in zip(rows, places, strict=True)]
        logits = decoder.decode([*tokens, *[None] * idle])
        for i, token in enumerate(tokens):
            if token is not None:
                found[i].append(logits[i])
    return [
        np.stack([rest[position - first] for position in row.positions])
        for row, rest, first in zip(rows, found, firsts, strict=True)
    ]


def _likelihood(logits: NDArray[np.float32], tokens: NDArray[np.int64]) -> Likelihood:
    """Return the likelihood of tokens [T] given logits [T, V]."""
    largest = logits.max(axis=-1)
    normalizer = np.log(np.exp(logits - largest[:, None]).sum(axis=-1, dtype=np.float64))
    chosen = logits[np.arange(len(tokens)), tokens].astype(np.float64)
    log_probability = float((chosen - largest - normalizer).sum())
    if not math.isfinite(log_probability):
        raise BundleError(
            "the logits are not finite: weights or LoRA are damaged, or too large for the dtype of the activations; "
            "check the bundle (coatrt verify), or score it without the LoRA (lora=none)"
        )
    return Likelihood(log_probability, bool((logits.argmax(axis=-1) == tokens).all()))
