"""ONNX Runtime's CUDA provider: fixed GPU addresses for every buffer, and decode steps replayed as a CUDA graph."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from coatrt.bundle import Bundle
from coatrt.configs.lora_contract import DecoderIO, LoraContract
from coatrt.engines.runtime.cuda_driver import open_driver
from coatrt.engines.runtime.cuda_memory import device_weights
from coatrt.engines.runtime.cuda_session import check_provider
from coatrt.engines.runtime.cuda_shared import shared_session
from coatrt.engines.runtime.device_decoder import DeviceDecoder
from coatrt.engines.runtime.memory import Memory
from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.errors import BuildError, reason
from coatrt.system.notices import warn_once

__all__ = ["CudaDecoder"]

_LOGITS, _WIDE = np.dtype(np.float32), np.dtype(np.int64)
_NOT_CAPTURED = "-1"  # the graph number in ONNX Runtime's run options that turns capturing off


class CudaDecoder(DeviceDecoder):
    """A decoder graph in ONNX Runtime's CUDA provider; caches, LoRA and inputs keep their addresses on the GPU.

    Args:
        graph: the cuda form of the graph.
        io: its inputs and outputs.
        contract: its LoRA inputs; None for a graph without LoRA.
        options: batch and context.
        weight_bytes: bytes of the weights on the GPU, for the memory check before they are loaded; 0 if unknown.
        content: hashes of the graph and its weights; decoders of equal content share one session and its weights.
        provider: "cpu" runs the same computation on the CPU, for tests.
        replay: whether decode steps are replayed as a CUDA graph.

    Raises:
        BuildError: there is no GPU that ONNX Runtime supports, not enough GPU memory, or the graph is refused.
    """

    def __init__(
        self,
        graph: Path,
        io: DecoderIO,
        contract: LoraContract | None,
        options: RuntimeOptions = RuntimeOptions(),
        *,
        weight_bytes: int = 0,
        content: str = "",
        provider: Literal["cuda", "cpu"] = "cuda",
        replay: bool = True,
    ) -> None:
        slots, batch = min(options.context, io.max_positions), options.batch
        driver = None
        if provider == "cuda":
            driver = open_driver()
            check_provider(driver)

        def memory(check: Callable[[bool], None]) -> Memory:
            self._shared = shared_session(graph, content, driver, check)
            self._lock = self._shared.lock
            return self._shared.memory()

        super().__init__(
            io,
            contract,
            batch,
            slots,
            driver,
            inputs={
                "logits_rows": ((batch, 1), _WIDE),
                "seqlens_k": ((batch,), np.dtype(np.int32)),
                "input_ids": ((batch, None), _WIDE),
                "position_ids": ((batch, None), _WIDE),
            },
            max_tokens=slots,
            logits=_LOGITS,
            weight_bytes=weight_bytes,
            advice="use a shorter --context or a smaller batch",
            memory=memory,
        )
        self._session, self._replays = self._shared.session, replay and driver is not None
        self._input_names = {node.name for node in self._session.get_inputs()}
        for name in (*io.past_names, *self._layout.pieces):
            if name not in self._input_names:
                raise BuildError(f"{graph.name} has no input {name}, which its bundle names; build the bundle again")
        self._total = np.zeros((), np.int32)  # read on the host
        # Two bindings: that of decode never changes, that of prefill is bound anew for each number of tokens.
        with self._lock:
            self._decode_binding, self._prefill_binding = self._new_binding(), self._new_binding()
            self._bind_step(self._decode_binding, 1)
            self._replay_options = self._run_options(self._shared.graph_number())
            self._plain_options = self._run_options(_NOT_CAPTURED)
            self._memory.synchronize()

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        options: RuntimeOptions = RuntimeOptions(),
        *,
        provider: Literal["cuda", "cpu"] = "cuda",
        replay: bool = True,
    ) -> "CudaDecoder":
        """Return the decoder of a bundle; warn in one line about weights that ONNX Runtime does not keep packed.

        Decoders of one bundle share its weights and run one at a time.

        Raises:
            BuildError: see `CudaDecoder`.
        """
        graph, io = bundle.decoder("cuda")
        weights = device_weights(bundle.config, bundle.model_matrices)
        facts, files = bundle.manifest["decoders"]["cuda"], bundle.manifest["files"]
        decoder = cls(
            graph,
            io,
            bundle.contract,
            options,
            weight_bytes=weights.nbytes,
            content=" ".join(files[facts[name]]["sha256"] for name in ("file", "weights")),
            provider=provider,
            replay=replay,
        )
        if weights.note and provider == "cuda":
            warn_once(weights.note)
        return decoder

    def run(
        self, tokens: NDArray[np.int64], starts: NDArray[np.int64], index: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Run the graph once: tokens [B, S] from positions `starts` [B]; return logits [B, 1, V] at `index` [B, 1].

        Raises:
            BuildError: the graph fails.
            ConfigError: see `OrtDecoder.run`.
        """
        self._check_chunk(tokens, starts)
        count = tokens.shape[1]
        ends = starts + count
        values = self._inputs(tokens, starts, index)
        values["logits_rows"] = index + count * np.arange(self.batch)[:, None]
        values["seqlens_k"] = (ends - 1).astype(np.int32)
        replay = self._replays and count == 1 and bool(starts.all())
        # A captured step serves every length: its total is all slots, and `seqlens_k` says how many are filled.
        self._total[...] = self._slots if replay else ends.max()
        with self._lock:  # nothing else may use the stream meanwhile
            self._memory.enter()
            self._steps.write(values, count)
            binding = self._decode_binding if count == 1 else self._prefill_binding
            if count > 1:
                self._bind_step(binding, count)
            try:
                self._session.run_with_iobinding(binding, self._replay_options if replay else self._plain_options)
            except Exception as error:  # onnxruntime's exceptions share no public base class
                raise BuildError(
                    f"ONNX Runtime fails in a step of {count} tokens ({reason(error)}); use a shorter --context or a "
                    "smaller batch"
                ) from None
            return self._read_logits()

    def _run_options(self, number: str) -> Any:
        options = ort.RunOptions()
        if self._memory.device == "cuda":
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            options.add_run_config_entry("gpu_graph_id", number)
        return options

    def _bind_step(self, binding: Any, tokens: int) -> None:
        """Bind the inputs that change with every call, for calls of `tokens` tokens."""
        for name, (address, shape, dtype) in self._steps.places(tokens).items():
            if name in self._input_names:
                binding.bind_input(name, self._memory.device, 0, dtype.type, list(shape), address)

    def _new_binding(self) -> Any:
        """Return a binding of all buffers that no call changes."""
        binding, device, io = self._session.io_binding(), self._memory.device, self.io
        half = self._dtype.type
        binding.bind_input("total_sequence_length", "cpu", 0, np.int32, [], self._total.ctypes.data)
        for name, (offset, matrix) in self._layout.pieces.items():
            binding.bind_input(name, device, 0, half, list(matrix), self._lora + offset)
        for past, present, cache in zip(io.past_names, io.present_names, self._caches, strict=True):
            binding.bind_input(past, device, 0, half, list(self._cache_shape), cache)
            binding.bind_output(present, device, 0, half, list(self._cache_shape), cache)
        binding.bind_output("logits", device, 0, _LOGITS.type, list(self._logits_shape), self._logits)
        return binding
