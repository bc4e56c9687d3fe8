"""The common base of GPU decoders: caches, LoRA, step inputs and logits at fixed addresses."""

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
    """A decoder whose buffers are allocated once; a subclass binds them to a runtime and runs it.

    Args:
        io: inputs and outputs of the graph.
        contract: its LoRA inputs; None for a graph without LoRA.
        batch: sequences per step.
        slots: KV cache slots per sequence.
        driver: the GPU; None allocates the buffers on the CPU, for tests.
        inputs: the inputs of a step: name → (shape, dtype); a size of None stands for the tokens of the step.
        max_tokens: tokens of the longest step.
        logits: dtype of the logits in the graph.
        weight_bytes: bytes of the weights; they are loaded later, but count in the memory check.
        advice: what the user can do if the GPU has too little memory.
        chunk: largest number of prompt tokens per sequence in one call; None runs every prompt in one call.
        memory: returns the memory for the buffers; None allocates a new one. It must call its argument, the memory
            check, before it loads anything, with whether the weights are on the GPU already.

    Raises:
        BuildError: there is not enough GPU memory, or the driver fails.
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
        max_tokens: int,
        logits: "np.dtype[Any]",
        weight_bytes: int,
        advice: str,
        chunk: int | None = None,
        memory: Callable[[Callable[[bool], None]], Memory] | None = None,
    ) -> None:
        super().__init__(io, contract, batch, slots, chunk)
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
        """Locked while the stream is in use; `memory` replaces it if decoders share a stream."""
        if memory is not None:
            buffers = memory(check)
        else:
            check(False)
            buffers = HostMemory() if driver is None else DeviceMemory(driver)
        self._memory = buffers
        with self._lock:
            buffers.enter()
            self._caches = [buffers.allocate(one_cache) for _ in io.past_names]
            self._lora = buffers.allocate(self._layout.nbytes)
            self._lora_staging: NDArray[np.uint8] | None = None
            self._steps = StepInputs(buffers, inputs, max_tokens)
            self._logits = buffers.allocate(logits_bytes)
            self._host_logits = buffers.host(logits_bytes).view(logits).reshape(self._logits_shape)

    def packed(self, tensors: LoraTensors) -> PackedLora:
        """Return LoRA tensors in the GPU's layout in page-locked memory, so that `set_lora` is one copy.

        Raises:
            ConfigError: the tensors do not match the contract.
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
            elif isinstance(tensors, PackedLora) and tensors.layout.matches(self._layout):
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
        """Copy the filled slots of every head of every sequence; they are contiguous per head only."""
        stride = self._slots * self.io.head_dim * self._dtype.itemsize
        with self._lock:
            self._memory.enter()
            for address, cache in zip(self._caches, caches, strict=True):
                for number, head in enumerate(cache.reshape(-1, *cache.shape[2:])):
                    copy(address + number * stride, head)
            self._memory.synchronize()

    def _read_logits(self) -> NDArray[np.float32]:
        """Wait for the step and return a copy of its logits, float32 [B, 1, V]."""
        self._memory.read(self._logits, self._host_logits)
        self._memory.synchronize()
        return self._host_logits.astype(np.float32)
