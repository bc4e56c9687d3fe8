"""Sequences that move from one decoder to another: their lengths, and the filled part of every cache."""

from abc import abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coatrt.engines.runtime.decoder import CachedDecoder
from coatrt.errors import ConfigError

__all__ = ["State", "StatefulDecoder"]

State = tuple[NDArray[np.int64], list[NDArray[Any]]]
"""Lengths [B], and keys and values of each layer [B, KV, filled, D], as `DecoderIO.past_names` orders them."""


class StatefulDecoder(CachedDecoder):
    """A decoder that gives its sequences to another one, which goes on with them."""

    def state(self) -> State:
        """Return lengths and the filled part of every cache, copied."""
        return self.lengths, self._read_caches(int(self._lengths.max(initial=0)))

    def restore(self, state: State) -> None:
        """Go on from another decoder's state; its model must have the same layers and heads.

        Raises:
            ConfigError: it has other caches, or more positions than this decoder.
        """
        lengths, caches = state
        filled = int(lengths.max(initial=0))
        shape = (self.batch, self.io.kv_heads, filled, self.io.head_dim)
        if len(caches) != len(self.io.past_names) or any(cache.shape != shape for cache in caches):
            raise ConfigError("the sequences belong to another model or batch; start them anew")
        if filled > self.capacity:
            raise ConfigError(
                f"the sequences have {filled} positions and the decoder has {self.capacity}; load it with more context"
            )
        self._write_caches([np.ascontiguousarray(cache.astype(self._dtype)) for cache in caches])
        self._lengths = lengths.copy()

    @abstractmethod
    def _read_caches(self, filled: int) -> list[NDArray[Any]]:
        """Return the first slots of every cache, [B, KV, filled, D] each, copied."""

    @abstractmethod
    def _write_caches(self, caches: list[NDArray[Any]]) -> None:
        """Put these slots at the beginning of every cache."""

    def _check_pieces(self, tokens: NDArray[np.int64], starts: NDArray[np.int64]) -> None:
        """Refuse several tokens at once behind others, of more than one sequence: GroupQueryAttention has no such call.

        Raises:
            ConfigError: that is what is given.
        """
        if self.batch > 1 and tokens.shape[1] > 1 and starts.any():
            raise ConfigError(
                f"{tokens.shape[1]} tokens at once behind others are given for {self.batch} sequences; give one token "
                "at a time, or a batch of 1"
            )
