"""ONNX Runtime on the torch stream: sessions with in-memory weights, bound buffers, timed runs and graph replays."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import torch  # loads the CUDA libraries that the CUDA provider needs when the first session is made
from rows import summary

__all__ = ["DTYPES", "Bound", "cold_copies", "event_times", "free_memory", "session", "stream", "timed"]

DTYPES = {
    torch.float16: np.float16,
    torch.float32: np.float32,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.uint8: np.uint8,
    torch.float8_e4m3fn: onnx.TensorProto.FLOAT8E4M3FN,
}
_STREAMS: list[torch.cuda.Stream] = []


def stream() -> torch.cuda.Stream:
    """Return the one stream that ONNX Runtime and torch share (graphs cannot be captured on the default stream)."""
    if not _STREAMS:
        _STREAMS.append(torch.cuda.Stream())
    return _STREAMS[0]


def _held(array: np.ndarray) -> Any:
    if array.dtype == ml_dtypes.float8_e4m3fn:
        kind = onnx.TensorProto.FLOAT8E4M3FN
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint8), kind)
    return ort.OrtValue.ortvalue_from_numpy(array)


def session(
    model: onnx.ModelProto | str,
    weights: Mapping[str, np.ndarray] | None = None,
    *,
    dry: bool,
    graph: bool = False,
    config: Mapping[str, str] | None = None,
    level: str = "all",
    profile: str = "",
    library: str = "",
) -> Any:
    """Return a session on CUDA, or on the CPU in a dry run.

    Args:
        model: the model, or the path of its file.
        weights: initializers that the model declares as external data, held in memory.
        dry: take the CPU provider.
        graph: capture runs as CUDA graphs.
        config: session configuration entries.
        level: "all" or "none", the graph optimizations.
        profile: prefix of a profile to write.
        library: path of the custom operators that the model needs.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if level == "all" else levels.ORT_DISABLE_ALL
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    if library:
        options.register_custom_ops_library(library)
    held = {name: _held(array) for name, array in (weights or {}).items()}
    if held:
        options.add_external_initializers(list(held), list(held.values()))
    source = model if isinstance(model, str) else model.SerializeToString()
    if dry:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    cuda = {
        "device_id": "0",
        "user_compute_stream": str(stream().cuda_stream),
        "enable_cuda_graph": str(int(graph)),
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
    }
    providers = [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]
    made = ort.InferenceSession(source, options, providers=providers)
    if made.get_providers()[0] != "CUDAExecutionProvider":
        raise RuntimeError("the CUDA provider did not load")
    return made


class Bound:
    """A session with its inputs and outputs bound to torch tensors, which the caller reads and writes.

    Args:
        made: the session.
        tensors: input or output name → tensor; an output that shares its input's buffer names the same tensor.
        annotation: number of the CUDA graph; −1 runs without.
    """

    def __init__(self, made: Any, tensors: Mapping[str, torch.Tensor], annotation: int = -1) -> None:
        self._session, self._kept = made, dict(tensors)
        self._binding = made.io_binding()
        self._options = ort.RunOptions()
        if "CUDAExecutionProvider" in made.get_providers():
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            self._options.add_run_config_entry("gpu_graph_id", str(annotation))
        for bind, infos in (
            (self._binding.bind_input, made.get_inputs()),
            (self._binding.bind_output, made.get_outputs()),
        ):
            for info in infos:
                tensor = tensors[info.name]
                device = tensor.device.type
                kind = DTYPES[tensor.dtype]
                bind(info.name, device, 0, kind, list(tensor.shape), tensor.data_ptr())

    def __call__(self) -> None:
        """Run once; on CUDA this returns before the device has finished."""
        self._session.run_with_iobinding(self._binding, self._options)


def event_times(work: Callable[[], Any], repeats: int, *, dry: bool, warm: int = 3) -> list[float]:
    """Return the milliseconds of each of some calls of `work`, by CUDA events on the shared stream."""
    if dry:
        work()
        return [1.0, 1.0]
    with torch.cuda.stream(stream()):
        for _ in range(warm):
            work()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        torch.cuda.synchronize()
        marks[0].record()
        for mark in marks[1:]:
            work()
            mark.record()
        torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(marks)]


def timed(work: Callable[[], Any], repeats: int, *, dry: bool, parts: int = 1) -> dict[str, float]:
    """Return median, p10 and p90 of the microseconds that one of `parts` equal parts of a call takes."""
    return summary([ms * 1e3 / parts for ms in event_times(work, repeats, dry=dry)])


def cold_copies(nbytes: int, *, dry: bool, total: int = 256 << 20, most: int = 48) -> int:
    """Return how many copies of a weight make one pass larger than the L2 cache several times, within reason."""
    return 2 if dry else max(2, min(most, -(-total // nbytes)))


def free_memory(dry: bool) -> float:
    """Return the free bytes of the device after torch has emptied its cache."""
    if dry:
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return float(torch.cuda.mem_get_info()[0])
