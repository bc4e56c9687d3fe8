"""TensorRT: an engine of a bundle on this machine's GPU, every buffer at a fixed address.

This runtime has not run on a GPU yet: its calls are tested against a fake of the library. The caches are bound as past
and present alike, so TensorRT writes them in place; with fixed addresses a decode step can be captured as a CUDA graph.
"""

import importlib
from typing import Any

import ml_dtypes  # noqa: F401 - with it numpy knows "bfloat16"
import numpy as np
from numpy.typing import NDArray

from coatrt.bundle import Bundle
from coatrt.configs.lora_contract import DecoderIO, LoraContract
from coatrt.devices.probe import probe
from coatrt.engines.runtime.decoder import CachedDecoder
from coatrt.errors import BuildError

__all__ = ["TrtDecoder"]


class TrtDecoder(CachedDecoder):
    """A decoder engine with its caches and LoRA on the GPU.

    Args:
        trt: the module tensorrt_rtx or tensorrt.
        plan: the engine's bytes, their hash checked.
        io: inputs and outputs of the graph it was built from.
        contract: its LoRA inputs.
        batch: sequences at once, within the engine's profile.
        prefill: most tokens per sequence in one call, the profile's.

    Raises:
        BuildError: the engine does not load.
    """

    def __init__(self, trt: Any, plan: bytes, io: DecoderIO, contract: LoraContract, batch: int, prefill: int) -> None:
        from polygraphy import cuda

        assert io.cache_length is not None, "the engine form has fixed caches"
        super().__init__(io, contract, batch, io.cache_length, prefill)
        self._stream = cuda.Stream()
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise BuildError(
                "the engine does not load: another TensorRT version or another GPU; build the bundle again"
            )
        self._context = self._engine.create_execution_context()
        itemsize = self._dtype.itemsize
        self._buffers: dict[str, Any] = {}

        def reserve(name: str, nbytes: int) -> None:
            self._buffers[name] = cuda.DeviceArray(shape=(nbytes,), dtype=np.uint8)
            self._context.set_tensor_address(name, self._buffers[name].ptr)

        empty = np.zeros((batch, io.kv_heads, io.cache_length, io.head_dim), self._dtype)
        for past, present in zip(io.past_names, io.present_names, strict=True):
            reserve(past, empty.nbytes)
            self._context.set_tensor_address(present, self._buffers[past].ptr)
            self._context.set_input_shape(past, empty.shape)
            self._bind(past, empty)
        for name, (rows, columns) in contract.shapes.items():
            reserve(name, rows * columns * itemsize)
        for name in ("input_ids", "position_ids"):
            reserve(name, batch * prefill * 8)
        for name in ("write_index", "logits_index"):
            reserve(name, batch * 8)
        reserve("logits", batch * io.vocabulary * itemsize)
        self.set_lora(None)

    @classmethod
    def of(cls, bundle: Bundle, batch: int = 1) -> "TrtDecoder":
        """Return the decoder of the bundle's engine that fits this machine; the engine is hashed before it is read.

        Raises:
            BuildError: no GPU, no engine for it, or another TensorRT version than the engine needs.
        """
        gpus = probe()
        if not gpus:
            raise BuildError("no NVIDIA GPU here; run the bundle with --backend ort")
        engines = bundle.manifest["engines"]
        fits = [engine for engine in engines if gpus[0].sm in engine["sms"]]
        if not fits:
            have = ", ".join(f"SM{sm}" for engine in engines for sm in engine["sms"]) or "none"
            raise BuildError(f"the bundle has engines for {have}, this GPU is SM{gpus[0].sm}; build one for it")
        facts = fits[0]
        try:
            trt = importlib.import_module(facts["builder"].replace("-", "_"))
        except ImportError as error:
            raise BuildError(
                f"the engine needs {facts['builder']} ({error}); install it, or use --backend ort"
            ) from None
        if trt.__version__ != facts["version"]:
            raise BuildError(
                f"the engine needs {facts['builder']} {facts['version']}, here is {trt.__version__}; "
                "engines do not load across versions: build the bundle again"
            )
        if batch > facts["shapes"]["batch"]:
            raise BuildError(
                f"the engine takes a batch of {facts['shapes']['batch']}, {batch} is given; build with --batch"
            )
        _, io = bundle.decoder("engine")
        plan = bundle.path(facts["file"]).read_bytes()
        return cls(trt, plan, io, bundle.contract, batch, facts["shapes"]["prefill"])

    def run(
        self, tokens: NDArray[np.int64], starts: NDArray[np.int64], index: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Run the engine once: tokens [B, S] from positions `starts` [B]; return logits [B, 1, V] at `index` [B, 1].

        Raises:
            BuildError: the engine fails.
        """
        for name, value in self._inputs(tokens, starts, index).items():
            self._context.set_input_shape(name, value.shape)
            self._bind(name, value.astype(np.int64))
        if not self._context.execute_async_v3(self._stream.ptr):
            raise BuildError("the engine failed to run; look at the TensorRT messages above")
        logits = np.empty((self.batch, self.io.vocabulary), self._dtype)
        self._buffers["logits"].copy_to(logits.reshape(-1).view(np.uint8), self._stream)
        self._stream.synchronize()
        return logits.astype(np.float32)[:, None]

    def _bind(self, name: str, value: NDArray[Any]) -> None:
        data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        self._buffers[name].copy_from(data, self._stream)
        self._stream.synchronize()  # the host array may go away
