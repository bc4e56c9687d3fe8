"""TensorRT: an engine of a bundle on this machine's GPU, every buffer at a fixed address.

This runtime has not run on a GPU yet: its calls are tested against a fake of the library. The caches are bound as past
and present alike, so TensorRT writes them in place; with fixed addresses a decode step can be captured as a CUDA graph.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from coatrt.bundle import Bundle
from coatrt.configs.lora_contract import DecoderIO, LoraContract
from coatrt.devices.probe import probe
from coatrt.engines.runtime.decoder import CachedDecoder, LoraTensors, check_lora, check_tokens, pad_right
from coatrt.errors import BuildError

__all__ = ["TrtDecoder"]

_MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
_NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


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
        super().__init__(io, batch, io.cache_length)
        self.contract, self._prefill = contract, prefill
        self._dtype = _NUMPY[io.activations]
        self._stream = cuda.Stream()
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise BuildError(
                "the engine does not load: another TensorRT version or another GPU; build the bundle again"
            )
        self._context = self._engine.create_execution_context()
        itemsize = np.dtype(self._dtype).itemsize
        self._buffers: dict[str, Any] = {}

        def reserve(name: str, nbytes: int) -> None:
            self._buffers[name] = cuda.DeviceArray(shape=(nbytes,), dtype=np.uint8)
            self._context.set_tensor_address(name, self._buffers[name].ptr)

        for past, present in zip(io.past_names, io.present_names, strict=True):
            reserve(past, batch * io.kv_heads * io.cache_length * io.head_dim * itemsize)
            self._context.set_tensor_address(present, self._buffers[past].ptr)
            self._context.set_input_shape(past, (batch, io.kv_heads, io.cache_length, io.head_dim))
        for name, (rows, columns) in contract.shapes.items():
            reserve(name, rows * columns * itemsize)
        for name in ("input_ids", "position_ids"):
            reserve(name, batch * prefill * 8)
        for name in ("write_index", "logits_index"):
            reserve(name, batch * 8)
        reserve("logits", batch * io.vocabulary * itemsize)
        for cache in io.past_names:
            self._write(cache, np.zeros((batch, io.kv_heads, io.cache_length, io.head_dim), self._dtype))
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
            trt = importlib.import_module(_MODULES[facts["builder"]])
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

    def set_lora(self, tensors: LoraTensors | None) -> None:
        """Copy the tensors of the contract into their buffers, cast to the activations; None: zeros.

        Raises:
            ConfigError: they are not those of the contract.
        """
        if tensors is not None:
            check_lora(self.contract, tensors)
        for name, shape in self.contract.shapes.items():
            self._write(name, np.zeros(shape, self._dtype) if tensors is None else tensors[name].astype(self._dtype))

    def prefill(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Start new sequences and return the logits after each prompt, float32 [B, V]; long prompts go in pieces.

        Raises:
            ConfigError: another number of prompts than the batch, or prompts the engine cannot run.
        """
        check_tokens(prompts, self.io, self.batch, 0, self._capacity)
        tokens, lengths = pad_right(prompts)
        result = np.zeros((self.batch, self.io.vocabulary), np.float32)
        for start in range(0, tokens.shape[1], self._prefill):
            piece = tokens[:, start : start + self._prefill]
            last = lengths - 1 - start
            index = np.clip(last, 0, piece.shape[1] - 1)[:, None]
            logits = self.run(piece, np.full(self.batch, start), index)
            ends = (0 <= last) & (last < piece.shape[1])
            result[ends] = logits[ends, 0]
        self._lengths = lengths
        return result

    def run(
        self, tokens: NDArray[np.int64], starts: NDArray[np.int64], index: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Run the engine once: tokens [B, S] from positions `starts` [B]; return logits [B, 1, V] at `index` [B, 1].

        Positions filled are not counted: `prefill` and `decode` do.

        Raises:
            BuildError: the engine fails.
        """
        for name, value in self._inputs(tokens, starts, index).items():
            self._context.set_input_shape(name, value.shape)
            self._write(name, value.astype(np.int64))
        if not self._context.execute_async_v3(self._stream.ptr):
            raise BuildError("the engine failed to run; look at the TensorRT messages above")
        logits = np.empty((self.batch, self.io.vocabulary), self._dtype)
        self._buffers["logits"].copy_to(logits.reshape(-1).view(np.uint8), self._stream)
        self._stream.synchronize()
        return logits.astype(np.float32)[:, None]

    def _write(self, name: str, value: NDArray[Any]) -> None:
        data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        self._buffers[name].copy_from(data, self._stream)
        self._stream.synchronize()  # the host array may go away
