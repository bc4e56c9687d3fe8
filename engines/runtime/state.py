"""The state of sequences that move from one decoder to another: lengths and the filled part of every KV cache."""

from abc import abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coatrt.engines.runtime.decoder import CachedDecoder
from coatrt.errors import ConfigError

__all__ = ["State", "StatefulDecoder"]

State = tuple[NDArray[np.int64], list[NDArray[Any]]]
"""Lengths [B], and keys and values of each layer [B, KV, filled, D] in the order of `DecoderIO.past_names`."""


class StatefulDecoder(CachedDecoder):
    """A decoder whose sequences another decoder can continue."""

    def state(self) -> State:
        """Return a copy of the lengths and of the filled part of every cache."""
        return self.lengths, self._read_caches(int(self._lengths.max(initial=0)))

    def restore(self, state: State) -> None:
        """Continue from another decoder's state; its model must have the same layers and heads.

        Raises:
            ConfigError: the state has caches of other shapes, or more positions than this decoder.
        """
        lengths, caches = state
        filled = int(lengths.max(initial=0))
        shape = (self.batch, self.io.kv_heads, filled, self.io.head_dim)
        if len(caches) != len(self.io.past_names) or any(cache.shape != shape for cache in caches):
            raise ConfigError("the sequences belong to another model or batch; start new ones with prefill")
        if filled > self.capacity:
            raise ConfigError(
                f"the sequences have {filled} positions, the decoder has {self.capacity}; load it with a longer context"
            )
        self._write_caches([np.ascontiguousarray(cache.astype(self._dtype)) for cache in caches])
        self._lengths = lengths.copy()

    @abstractmethod
    def _read_caches(self, filled: int) -> list[NDArray[Any]]:
        """Return a copy of the first slots of every cache, [B, KV, filled, D] each."""

    @abstractmethod
    def _write_caches(self, caches: list[NDArray[Any]]) -> None:
        """Copy these slots to the beginning of every cache."""

    def _check_chunk(self, tokens: NDArray[np.int64], starts: NDArray[np.int64]) -> None:
        """Refuse several new tokens after a filled cache in a batch, which GroupQueryAttention does not support.

        Raises:
            ConfigError: the call has several new tokens, a filled cache and a batch above 1.
        """
        if self.batch > 1 and tokens.shape[1] > 1 and starts.any():
            raise ConfigError(
                f"cannot append {tokens.shape[1]} tokens at once to a batch of {self.batch}; append one token at a "
                "time, or use a batch of 1"
            )
