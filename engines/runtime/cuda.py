"""ONNX Runtime's CUDA provider: every buffer at a fixed address on the GPU, a decode step replayed as a CUDA graph."""

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from coatrt.bundle import Bundle
from coatrt.configs.lora_contract import DecoderIO, LoraContract
from coatrt.engines.runtime.cuda_driver import DeviceMemory, open_driver
from coatrt.engines.runtime.cuda_memory import check_memory, device_weights
from coatrt.engines.runtime.cuda_session import check_provider, cuda_session
from coatrt.engines.runtime.decoder import LoraTensors
from coatrt.engines.runtime.memory import HostMemory, Memory, aligned
from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.engines.runtime.packed_lora import LoraLayout, PackedLora
from coatrt.engines.runtime.state import StatefulDecoder
from coatrt.errors import BuildError, reason
from coatrt.system.notices import warn_once

__all__ = ["CudaDecoder"]

_LOGITS = np.dtype(np.float32)
_CAPTURED, _NOT_CAPTURED = "1", "-1"  # numbers of CUDA graphs in ONNX Runtime's run options


class CudaDecoder(StatefulDecoder):
    """A decoder graph in ONNX Runtime's CUDA provider; caches, LoRA and inputs stay where they are on the GPU.

    Args:
        graph: the cuda form of the graph.
        io: its inputs and outputs.
        contract: its LoRA inputs; None where it has none.
        options: batch and context.
        weight_bytes: of the weights on the GPU, where it is known: they are refused before they are loaded.
        provider: "cpu" computes the same on the CPU, for tests.
        replay: whether decode steps are replayed as a CUDA graph.

    Raises:
        BuildError: no GPU that ONNX Runtime serves, not enough memory on it, or a graph that is refused.
    """

    def __init__(
        self,
        graph: Path,
        io: DecoderIO,
        contract: LoraContract | None,
        options: RuntimeOptions = RuntimeOptions(),
        *,
        weight_bytes: int = 0,
        provider: Literal["cuda", "cpu"] = "cuda",
        replay: bool = True,
    ) -> None:
        self._slots = min(options.context, io.max_positions)
        super().__init__(io, contract, options.batch, self._slots)
        self._layout = LoraLayout(contract, self._dtype)
        self._cache_shape = (options.batch, io.kv_heads, self._slots, io.head_dim)
        one_cache = aligned(math.prod(self._cache_shape) * self._dtype.itemsize)
        memory: Memory = HostMemory()
        if provider == "cuda":
            driver = open_driver()
            check_provider(driver)
            caches = one_cache * len(io.past_names)
            logits = options.batch * io.vocabulary * _LOGITS.itemsize
            check_memory(driver, weight_bytes, caches, self._layout.nbytes + logits, self._slots, options.batch)
            memory = DeviceMemory(driver)
        self._memory, self._replays = memory, replay and provider == "cuda"
        self._session = cuda_session(graph, memory)
        self._inputs_here = {one.name for one in self._session.get_inputs()}
        for name in (*io.past_names, *self._layout.pieces):
            if name not in self._inputs_here:
                raise BuildError(f"{graph.name} has no input {name}, which its bundle names; build the bundle again")
        self._caches = [memory.allocate(one_cache) for _ in io.past_names]
        self._lora = memory.allocate(self._layout.nbytes)
        self._lora_staging: NDArray[np.uint8] | None = None
        self._steps = memory.allocate(self._step_bytes(self._slots))
        self._steps_staging = memory.host(self._step_bytes(self._slots))
        self._total = np.zeros((), np.int32)  # read on the host
        logits_shape = (options.batch, 1, io.vocabulary)
        self._logits = memory.allocate(math.prod(logits_shape) * _LOGITS.itemsize)
        self._logits_here = memory.host(math.prod(logits_shape) * _LOGITS.itemsize).view(_LOGITS).reshape(logits_shape)
        # Two bindings: what decode binds stays as it is, a prefill binds its own number of tokens.
        self._decode_binding, self._prefill_binding = self._bound(), self._bound()
        self._bind_step(self._decode_binding, 1)
        self._captured, self._plain = self._run_options(_CAPTURED), self._run_options(_NOT_CAPTURED)
        memory.synchronize()

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        options: RuntimeOptions = RuntimeOptions(),
        *,
        provider: Literal["cuda", "cpu"] = "cuda",
        replay: bool = True,
    ) -> "CudaDecoder":
        """Return the decoder of a bundle; one line says which weights ONNX Runtime does not keep packed.

        Raises:
            BuildError: see `CudaDecoder`.
        """
        graph, io = bundle.decoder("cuda")
        weights = device_weights(bundle.config, bundle.model_matrices)
        made = cls(graph, io, bundle.contract, options, weight_bytes=weights.nbytes, provider=provider, replay=replay)
        if weights.note and provider == "cuda":
            warn_once(weights.note)
        return made

    def packed(self, tensors: LoraTensors) -> PackedLora:
        """Return LoRA tensors as they lie on the GPU, in page-locked memory: `set_lora` of that is one copy.

        Raises:
            ConfigError: they are not those of the contract.
        """
        configuration = self._check_lora(tensors)
        self._memory.enter()
        buffer = self._memory.host(self._layout.nbytes)
        self._layout.fill(buffer, tensors)
        return PackedLora(buffer, self._layout, configuration)

    def _take_lora(self, tensors: LoraTensors | None) -> None:
        memory = self._memory
        memory.enter()
        if tensors is None:
            memory.clear(self._lora, self._layout.nbytes)
        elif isinstance(tensors, PackedLora) and tensors.layout.pieces == self._layout.pieces:
            memory.write(self._lora, tensors.buffer)
        else:
            if self._lora_staging is None:
                self._lora_staging = memory.host(self._layout.nbytes)
            self._layout.fill(self._lora_staging, tensors)
            memory.write(self._lora, self._lora_staging)
        memory.synchronize()

    def _read_caches(self, filled: int) -> list[NDArray[Any]]:
        self._memory.enter()
        caches = [np.empty((*self._cache_shape[:2], filled, self._cache_shape[3]), self._dtype) for _ in self._caches]
        self._each_head(caches, self._memory.read)
        return caches

    def _write_caches(self, caches: list[NDArray[Any]]) -> None:
        self._memory.enter()
        self._each_head(caches, self._memory.write)

    def _each_head(self, caches: list[NDArray[Any]], copy: Any) -> None:
        """Copy the filled slots of each sequence's heads: they lie together, those of the next head do not."""
        stride = self._slots * self.io.head_dim * self._dtype.itemsize
        for address, cache in zip(self._caches, caches, strict=True):
            for number, head in enumerate(cache.reshape(-1, *cache.shape[2:])):
                copy(address + number * stride, head)
        self._memory.synchronize()

    def run(
        self, tokens: NDArray[np.int64], starts: NDArray[np.int64], index: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Run the graph once: tokens [B, S] from positions `starts` [B]; return logits [B, 1, V] at `index` [B, 1].

        Raises:
            BuildError: the graph fails.
            ConfigError: see `OrtDecoder.run`.
        """
        self._check_pieces(tokens, starts)
        added = tokens.shape[1]
        ends = starts + added
        values = self._inputs(tokens, starts, index)
        values["logits_rows"] = index + added * np.arange(self.batch)[:, None]
        values["seqlens_k"] = (ends - 1).astype(np.int32)
        replays = self._replays and added == 1 and bool(starts.all())
        # A captured step is the same for every length: it is told of all slots, and `seqlens_k` says which are filled.
        self._total[...] = self._slots if replays else ends.max()
        memory, size = self._memory, 0
        memory.enter()
        for name, (offset, shape, dtype) in self._step_pieces(added).items():
            place = self._steps_staging[offset : offset + math.prod(shape) * dtype.itemsize]
            place.view(dtype)[...] = values[name].reshape(-1)
            size = offset + place.nbytes
        memory.write(self._steps, self._steps_staging[:size])
        binding = self._decode_binding if added == 1 else self._prefill_binding
        if added > 1:
            self._bind_step(binding, added)
        try:
            self._session.run_with_iobinding(binding, self._captured if replays else self._plain)
        except Exception as error:  # onnxruntime raises types of its own that share no public base
            raise BuildError(
                f"ONNX Runtime fails in a step of {added} tokens ({reason(error)}); give less --context or batch"
            ) from None
        memory.read(self._logits, self._logits_here)
        memory.synchronize()
        return self._logits_here.copy()

    def _run_options(self, number: str) -> Any:
        options = ort.RunOptions()
        if self._memory.device == "cuda":
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            options.add_run_config_entry("gpu_graph_id", number)
        return options

    def _step_pieces(self, added: int) -> dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]]:
        """Return what changes with every call: name → offset in the buffer, shape, dtype."""
        wide, batch, offset = np.dtype(np.int64), self.batch, 0
        pieces: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]] = {}
        for name, shape, dtype in (
            ("logits_rows", (batch, 1), wide),
            ("seqlens_k", (batch,), np.dtype(np.int32)),
            ("input_ids", (batch, added), wide),
            ("position_ids", (batch, added), wide),
        ):
            pieces[name] = offset, shape, dtype
            offset += aligned(math.prod(shape) * dtype.itemsize)
        return pieces

    def _step_bytes(self, added: int) -> int:
        offset, shape, dtype = list(self._step_pieces(added).values())[-1]
        return offset + aligned(math.prod(shape) * dtype.itemsize)

    def _bind_step(self, binding: Any, added: int) -> None:
        """Bind what changes with every call, for calls of so many tokens."""
        for name, (offset, shape, dtype) in self._step_pieces(added).items():
            if name in self._inputs_here:
                binding.bind_input(name, self._memory.device, 0, dtype.type, list(shape), self._steps + offset)

    def _bound(self) -> Any:
        """Return everything bound that no call changes."""
        binding, device, io = self._session.io_binding(), self._memory.device, self.io
        half = self._dtype.type
        binding.bind_input("total_sequence_length", "cpu", 0, np.int32, [], self._total.ctypes.data)
        for name, (offset, matrix) in self._layout.pieces.items():
            binding.bind_input(name, device, 0, half, list(matrix), self._lora + offset)
        for past, present, cache in zip(io.past_names, io.present_names, self._caches, strict=True):
            binding.bind_input(past, device, 0, half, list(self._cache_shape), cache)
            binding.bind_output(present, device, 0, half, list(self._cache_shape), cache)
        binding.bind_output("logits", device, 0, _LOGITS.type, [self.batch, 1, io.vocabulary], self._logits)
        return binding
