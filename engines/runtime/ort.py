"""ONNX Runtime on the CPU: runs every bundle on every machine; buffers are bound once, caches are updated in place."""

import contextlib
import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from coatrt.configs.lora_contract import DecoderIO, LoraContract
from coatrt.devices.environment import usable_cores
from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.engines.runtime.state import StatefulDecoder
from coatrt.errors import BuildError, BundleError, reason

__all__ = ["OrtDecoder", "open_graph", "session"]


def session(graph: Path, threads: int | None = None, accuracy_level: int = 0) -> Any:
    """Return an ONNX Runtime session on the CPU.

    Args:
        graph: the model file.
        threads: threads per operator; by default all usable cores.
        accuracy_level: of int4 and int8 matrix products. 0 decodes the weights when the graph loads: exact, 4 bytes per
            weight. 1 keeps them packed and multiplies in float32: exact too, and slow (int8 on AVX2 is a hundred times
            slower than with 4: ONNX Runtime 1.32 decodes the weight in every call). 4 keeps them packed and accumulates
            in int8: fastest, with visible rounding differences.

    Raises:
        BuildError: ONNX Runtime refuses the graph.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors are raised; logging them too would print them twice
    options.intra_op_num_threads = threads or usable_cores()
    if accuracy_level == 0:  # with quantization off, DequantizeLinear of a constant is folded like any other node
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy_level))
    try:
        result = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no public base class
        raise BuildError(f"ONNX Runtime refuses {graph.name} ({reason(error)}); export it again") from None
    _trim_heap()
    return result


def open_graph(graph: Path, io: DecoderIO, contract: LoraContract | None, options: RuntimeOptions) -> tuple[Any, int]:
    """Return the session of a decoder graph, its inputs checked, and the cache slots of a sequence.

    Args:
        graph: the cpu form of the graph.
        io: its inputs and outputs.
        contract: its LoRA inputs; None for a graph without LoRA.
        options: threads and accuracy level; the context applies if the graph leaves the cache length open.

    Raises:
        BuildError: ONNX Runtime refuses the graph, or it lacks an input that `io` or `contract` names.
        BundleError: an input has another shape than `io` or `contract` says.
    """
    slots = io.cache_length or min(options.context, io.max_positions)
    opened = session(graph, options.threads, options.accuracy_level)
    inputs = {node.name: node.shape for node in opened.get_inputs()}
    for name in (*io.past_names, *(contract.inputs if contract is not None else ())):
        if name not in inputs:
            raise BuildError(f"{graph.name} has no input {name}, which its bundle names; build the bundle again")
    cache = (None, io.kv_heads, io.cache_length, io.head_dim)
    for name, shape in (*((n, cache) for n in io.past_names), *(contract.inputs if contract else {}).items()):
        actual = tuple(size if isinstance(size, int) else None for size in inputs[name])
        if actual[-2:] != shape[-2:] or actual[1:-2] != shape[1:-2]:  # checked before memory of that size is used
            raise BundleError(
                f"{graph.name}: {name} has shape {actual}, its bundle says {shape}; build the bundle again"
            )
    return opened, slots


def _trim_heap() -> None:
    """Return freed memory to the system: constant folding leaves twice the size of the weights resident.

    SmolLM2-135M with 80 nvfp4 matrices: 985 MiB resident after loading, 493 MiB after trimming. Only glibc needs this
    and has `malloc_trim`.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class OrtDecoder(StatefulDecoder):
    """A decoder graph in ONNX Runtime; caches and LoRA are bound once, and the caches are updated in place.

    Args:
        graph: the cpu form of the graph.
        io: its inputs and outputs.
        contract: its LoRA inputs; None for a graph without LoRA.
        options: threads, batch and accuracy level; the context applies if the graph leaves the cache length open.

    Raises:
        BuildError: ONNX Runtime refuses the graph, or it lacks an input that `io` or `contract` names.
        BundleError: an input has another shape than `io` or `contract` says, or the caches cannot be allocated.
    """

    def __init__(
        self,
        graph: Path,
        io: DecoderIO,
        contract: LoraContract | None,
        options: RuntimeOptions = RuntimeOptions(),
    ) -> None:
        self._session, slots = open_graph(graph, io, contract, options)
        super().__init__(io, contract, options.batch, slots)
        self._binding = self._session.io_binding()
        shape = (options.batch, io.kv_heads, slots, io.head_dim)
        try:
            self._caches = [ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, self._dtype)) for _ in io.past_names]
        except ValueError as error:  # only sizes of an altered manifest get here
            raise BundleError(f"cannot allocate caches of shape {shape} ({error}); build the bundle again") from None
        for past, present, cache in zip(io.past_names, io.present_names, self._caches, strict=True):
            self._binding.bind_ortvalue_input(past, cache)
            self._binding.bind_ortvalue_output(present, cache)
        self._lora: dict[str, Any] = {}
        self.set_lora(None)

    def _bind(self, name: str, value: NDArray[Any]) -> None:
        self._lora[name] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
        self._binding.bind_ortvalue_input(name, self._lora[name])

    def _read_caches(self, filled: int) -> list[NDArray[Any]]:
        return [cache.numpy()[:, :, :filled].copy() for cache in self._caches]

    def _write_caches(self, caches: list[NDArray[Any]]) -> None:
        for buffer, cache in zip(self._caches, caches, strict=True):
            values = buffer.numpy().copy()
            values[:, :, : cache.shape[2]] = cache
            buffer.update_inplace(np.ascontiguousarray(values))

    def run(
        self, tokens: NDArray[np.int64], starts: NDArray[np.int64], index: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Run the graph once: tokens [B, S] from positions `starts` [B]; return logits [B, T, V] at `index` [B, T].

        Raises:
            ConfigError: several new tokens after a filled cache in a batch above 1, which ONNX Runtime's attention does
                not support.
        """
        self._check_chunk(tokens, starts)
        for name, value in self._inputs(tokens, starts, index).items():
            self._binding.bind_cpu_input(name, np.ascontiguousarray(value))
        self._binding.bind_output("logits")
        self._session.run_with_iobinding(self._binding)
        logits = self._binding.get_outputs()[-1]  # outputs come in binding order, and the caches were bound first
        return np.asarray(logits.numpy(), np.float32)
