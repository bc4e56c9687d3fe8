"""What the decoders on a GPU share: caches, LoRA, step inputs and logits that stay where they are."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coatrt.configs.lora_contract import DecoderIO, LoraContract
from coatrt.engines.runtime.cuda_driver import CudaDriver, DeviceMemory
from coatrt.engines.runtime.cuda_memory import check_memory
from coatrt.engines.runtime.decoder import LoraTensors
from coatrt.engines.runtime.memory import HostMemory, Memory, aligned
from coatrt.engines.runtime.packed_lora import LoraLayout, PackedLora
from coatrt.engines.runtime.state import StatefulDecoder
from coatrt.engines.runtime.step_inputs import StepInputs

__all__ = ["DeviceDecoder"]


class DeviceDecoder(StatefulDecoder):
    """A decoder whose buffers are made once; a runtime binds them and computes.

    Args:
        io: inputs and outputs of the graph.
        contract: its LoRA inputs; None where it has none.
        batch: sequences at once.
        slots: of the KV cache per sequence.
        driver: the GPU; None has the buffers on the CPU, for tests.
        inputs: what changes with every step: name → shape, None for its tokens, and dtype.
        most: tokens of the longest step.
        logits: their dtype in the graph.
        weight_bytes: of the weights, which are loaded later: they are refused before, with the rest.
        advice: what to do where the GPU has no room.
        piece: most tokens per sequence in one call; None takes every prompt whole.
        memory: returns the memory for the buffers; None makes one. Before it loads anything it calls what it is given,
            with whether the weights are on the GPU already: that refuses what cannot fit.

    Raises:
        BuildError: not enough memory on the GPU, or the driver fails.
    """

    def __init__(
        self,
        io: DecoderIO,
        contract: LoraContract | None,
        batch: int,
        slots: int,
        driver: CudaDriver | None,
        *,
        inputs: Mapping[str, tuple[tuple[int | None, ...], "np.dtype[Any]"]],
        most: int,
        logits: "np.dtype[Any]",
        weight_bytes: int,
        advice: str,
        piece: int | None = None,
        memory: Callable[[Callable[[bool], None]], Memory] | None = None,
    ) -> None:
        super().__init__(io, contract, batch, slots, piece)
        self._slots, self._layout = slots, LoraLayout(contract, self._dtype)
        self._cache_shape = (batch, io.kv_heads, slots, io.head_dim)
        self._logits_shape = (batch, 1, io.vocabulary)
        one_cache = aligned(math.prod(self._cache_shape) * self._dtype.itemsize)
        logits_bytes = math.prod(self._logits_shape) * logits.itemsize

        def check(loaded: bool) -> None:
            if driver is not None:
                caches, other = one_cache * len(io.past_names), self._layout.nbytes + logits_bytes
                check_memory(driver, 0 if loaded else weight_bytes, caches, other, slots, batch, advice)

        self._lock: AbstractContextManager[Any] = nullcontext()
        """Held while the stream is used, where decoders share it; whoever makes the memory may set it."""
        if memory is not None:
            made = memory(check)
        else:
            check(False)
            made = HostMemory() if driver is None else DeviceMemory(driver)
        self._memory = made
        with self._lock:
            made.enter()
            self._caches = [made.allocate(one_cache) for _ in io.past_names]
            self._lora = made.allocate(self._layout.nbytes)
            self._lora_staging: NDArray[np.uint8] | None = None
            self._steps = StepInputs(made, inputs, most)
            self._logits = made.allocate(logits_bytes)
            self._logits_here = made.host(logits_bytes).view(logits).reshape(self._logits_shape)

    def packed(self, tensors: LoraTensors) -> PackedLora:
        """Return LoRA tensors as they lie on the GPU, in page-locked memory: `set_lora` of that is one copy.

        Raises:
            ConfigError: they are not those of the contract.
        """
        configuration = self._check_lora(tensors)
        with self._lock:
            self._memory.enter()
            buffer = self._memory.host(self._layout.nbytes)
        self._layout.fill(buffer, tensors)
        return PackedLora(buffer, self._layout, configuration)

    def _take_lora(self, tensors: LoraTensors | None) -> None:
        memory = self._memory
        with self._lock:
            memory.enter()
            if tensors is None:
                memory.clear(self._lora, self._layout.nbytes)
            elif isinstance(tensors, PackedLora) and tensors.layout.same(self._layout):
                memory.write(self._lora, tensors.buffer)
            else:
                if self._lora_staging is None:
                    self._lora_staging = memory.host(self._layout.nbytes)
                self._layout.fill(self._lora_staging, tensors)
                memory.write(self._lora, self._lora_staging)
            memory.synchronize()

    def _read_caches(self, filled: int) -> list[NDArray[Any]]:
        caches = [np.empty((*self._cache_shape[:2], filled, self._cache_shape[3]), self._dtype) for _ in self._caches]
        self._each_head(caches, self._memory.read)
        return caches

    def _write_caches(self, caches: list[NDArray[Any]]) -> None:
        self._each_head(caches, self._memory.write)

    def _each_head(self, caches: list[NDArray[Any]], copy: Any) -> None:
        """Copy the filled slots of each sequence's heads: they lie together, those of the next head do not."""
        stride = self._slots * self.io.head_dim * self._dtype.itemsize
        with self._lock:
            self._memory.enter()
            for address, cache in zip(self._caches, caches, strict=True):
                for number, head in enumerate(cache.reshape(-1, *cache.shape[2:])):
                    copy(address + number * stride, head)
            self._memory.synchronize()

    def _read_logits(self) -> NDArray[np.float32]:
        """Wait for the step and return its logits, float32 [B, 1, V], copied."""
        self._memory.read(self._logits, self._logits_here)
        self._memory.synchronize()
        return self._logits_here.astype(np.float32)
