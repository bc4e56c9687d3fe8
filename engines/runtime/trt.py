"""TensorRT: runs a bundle's engine with fixed GPU addresses for every buffer and replays decode steps as a CUDA graph.

This runtime has not run on a GPU yet: its calls are tested against fakes of TensorRT and of the driver, which run the
engine form of the graph on the CPU.
"""

from typing import Any

import ml_dtypes  # noqa: F401 - registers "bfloat16" with numpy
import numpy as np
from numpy.typing import NDArray

from coatrt.bundle import Bundle
from coatrt.configs.lora_contract import DecoderIO, LoraContract
from coatrt.engines.runtime.cuda_driver import CudaDriver, open_driver
from coatrt.engines.runtime.cuda_graph import CudaGraph
from coatrt.engines.runtime.device_decoder import DeviceDecoder
from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.engines.runtime.trt_engine import TrtContext, TrtEngine, engine_facts, load_library
from coatrt.errors import BuildError
from coatrt.system.notices import warn_once

__all__ = ["TrtDecoder"]

_WIDE = np.dtype(np.int64)


class TrtDecoder(DeviceDecoder):
    """A decoder engine; caches, LoRA and inputs keep their addresses, and the caches are updated in place.

    Args:
        trt: the module tensorrt_rtx or tensorrt.
        plan: the engine's bytes, whose hash the caller has checked.
        io: inputs and outputs of the graph it was built from.
        contract: its LoRA inputs; None for a graph without LoRA.
        batch: sequences per step, within the engine's profile.
        prefill: largest number of tokens per sequence in one call, as in the engine's profile.
        driver: the GPU.
        replay: whether decode steps are replayed as a CUDA graph; if that fails, it warns in one line.

    Raises:
        BuildError: there is not enough GPU memory, or the engine does not load.
    """

    def __init__(
        self,
        trt: Any,
        plan: bytes,
        io: DecoderIO,
        contract: LoraContract | None,
        batch: int,
        prefill: int,
        driver: CudaDriver,
        *,
        replay: bool = True,
    ) -> None:
        assert io.cache_length is not None, "the engine form has fixed caches"
        super().__init__(
            io,
            contract,
            batch,
            io.cache_length,
            driver,
            inputs={
                "write_index": ((batch,), _WIDE),
                "logits_index": ((batch, 1), _WIDE),
                "input_ids": ((batch, None), _WIDE),
                "position_ids": ((batch, None), _WIDE),
            },
            max_tokens=prefill,
            logits=np.dtype(io.activations),
            weight_bytes=len(plan),
            advice="use a smaller batch, or build the bundle with a shorter --context",
            chunk=prefill,
        )
        self._driver, self._stream, self._max_tokens = driver, self._memory.stream, prefill
        self._replays = replay
        self._graph: CudaGraph | None = None  # destroyed before the context it was captured from
        engine = TrtEngine(trt, plan)
        activations = self._memory.allocate(engine.activation_bytes)
        self._decode = self._bind_all(engine.context(activations, one_shape=True), 1)
        self._prefill = self._bind_all(engine.context(activations, one_shape=False), prefill)
        self._memory.synchronize()

    @classmethod
    def of(cls, bundle: Bundle, options: RuntimeOptions = RuntimeOptions(), *, replay: bool = True) -> "TrtDecoder":
        """Return the decoder of the bundle's engine for this GPU; the engine's hash is checked before it is loaded.

        Args:
            bundle: an opened bundle.
            options: only the batch is used; an engine's context is fixed.
            replay: see `TrtDecoder`.

        Raises:
            BuildError: there is no GPU, no engine for it, or not the TensorRT version the engine needs; see
                `TrtDecoder`.
        """
        driver = open_driver()
        facts = engine_facts(bundle, driver.sm, options.batch)
        trt = load_library(facts)
        _, io = bundle.decoder("engine")
        plan, prefill = bundle.path(facts["file"]).read_bytes(), facts["shapes"]["prefill"]
        return cls(trt, plan, io, bundle.contract, options.batch, prefill, driver, replay=replay)

    def run(
        self, tokens: NDArray[np.int64], starts: NDArray[np.int64], index: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Run the engine once: tokens [B, S] from positions `starts` [B]; return logits [B, 1, V] at `index` [B, 1].

        Raises:
            BuildError: the engine fails.
        """
        count, values = tokens.shape[1], self._inputs(tokens, starts, index)
        self._memory.enter()
        self._steps.write(values, 1 if count == 1 else self._max_tokens)
        if count > 1:
            for name in ("input_ids", "position_ids"):
                self._prefill.shape(name, values[name].shape)
            self._enqueue(self._prefill, count)
        elif self._graph is not None:
            self._graph.launch()
        else:
            self._enqueue(self._decode, count)
        logits = self._read_logits()
        if count == 1 and self._replays and self._graph is None:
            self._capture()  # after a plain run: TensorRT sets up lazily in the first run of a shape
        return logits

    def _enqueue(self, context: TrtContext, count: int) -> None:
        if failure := context.enqueue(self._stream):
            raise BuildError(
                f"the engine fails in a step of {count} tokens ({failure}); use a smaller batch, or build the bundle "
                "again"
            )

    def _capture(self) -> None:
        """Capture the decode step for later steps to replay; if that fails, warn and keep running it plainly."""

        def enqueue() -> None:
            if failure := self._decode.enqueue(self._stream):
                raise BuildError(failure)

        try:
            if not self._decode.capturable(self._stream):
                raise BuildError("TensorRT does not allow it")
            self._graph = CudaGraph(self._driver, self._stream, enqueue)
        except BuildError as error:
            self._replays = False
            warn_once(f"decoding is slower: the engine cannot be captured as a CUDA graph ({error})")

    def _bind_all(self, context: TrtContext, tokens: int) -> TrtContext:
        """Bind every tensor of a context, for steps of at most `tokens` tokens, and return it."""
        inputs = self._steps.places(tokens)
        for name, (offset, matrix) in self._layout.pieces.items():
            inputs[name] = self._lora + offset, matrix, self._dtype
        for past, present, cache in zip(self.io.past_names, self.io.present_names, self._caches, strict=True):
            inputs[past] = cache, self._cache_shape, self._dtype
            context.place(present, cache, self._cache_shape, self._dtype)
        for name, (address, shape, dtype) in inputs.items():
            context.place(name, address, shape, dtype)
            context.shape(name, shape)
        context.place("logits", self._logits, self._logits_shape, self._host_logits.dtype)
        return context
