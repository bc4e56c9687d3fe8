"""ONNX Runtime's CUDA provider: finds its libraries, checks that it supports this GPU, and opens sessions on it."""

import contextlib
import ctypes
import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime as ort

from coatrt.engines.runtime.cuda_driver import CudaDriver
from coatrt.engines.runtime.memory import Memory
from coatrt.errors import BuildError, reason
from coatrt.system.notices import warn_once

__all__ = ["SUPPORTED_SMS", "check_provider", "cuda_session", "supports"]

SUPPORTED_SMS = (75, 80, 86, 89, 90, 120)
"""Compute capabilities that onnxruntime-gpu 1.31 has machine code for; it ships no PTX that a driver could compile."""

_PROVIDER = "CUDAExecutionProvider"
_CUDA_LIBRARIES = ("cudart", "nvrtc", "nvJitLink", "cublasLt", "cublas", "curand", "cufft", "cudnn")
"""In load order: each library needs only those before it."""
_ALTERNATIVE = "or run the bundle with --backend ort"


def supports(sm: int) -> bool:
    """Return whether a GPU runs that machine code: of its own compute capability, or of a lower minor version."""
    return any(sm // 10 == supported // 10 and sm >= supported for supported in SUPPORTED_SMS)


def check_provider(driver: CudaDriver) -> None:
    """Refuse a GPU that the CUDA provider does not support, or an ONNX Runtime without the provider.

    Raises:
        BuildError: the GPU is not supported, or ONNX Runtime was built without CUDA.
    """
    if not supports(driver.sm):
        have = ", ".join(f"SM{sm}" for sm in SUPPORTED_SMS)
        raise BuildError(f"this GPU is SM{driver.sm}, onnxruntime-gpu has code for {have}; run with --backend ort")
    if _PROVIDER not in ort.get_available_providers():
        raise BuildError(
            f"onnxruntime {ort.__version__} here is built without CUDA; install onnxruntime-gpu in its place, "
            f"{_ALTERNATIVE}"
        )


def _load_libraries() -> None:
    """Load CUDA's libraries from pip's packages: ONNX Runtime finds only loaded ones and those on the system's path."""
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):  # it prints missing libraries
            ort.preload_dlls()
    if sys.platform == "win32":
        return
    places: list[Path] = []
    for package, below in (("nvidia", "*/lib"), ("torch", "lib")):
        spec = importlib.util.find_spec(package)  # locates the package without importing it
        for root in spec.submodule_search_locations or () if spec is not None else ():
            places += sorted(Path(root).glob(below))
    for name in _CUDA_LIBRARIES:
        for path in (path for place in places for path in sorted(place.glob(f"lib{name}.so.*"))):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(path))


def cuda_session(graph: Path, memory: Memory) -> Any:
    """Return a session of the cuda form on the device of `memory`; tests compare its numbers on the CPU.

    Args:
        graph: the model file.
        memory: gives the device and the stream that the session runs on.

    Raises:
        BuildError: the provider does not load, or refuses the graph.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors are raised; logging them too would print them twice
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")  # the CUDA provider has one level
    if memory.device == "cpu":
        return _open(graph, options, ["CPUExecutionProvider"])
    _load_libraries()
    cuda = {
        "device_id": "0",
        "user_compute_stream": str(memory.stream),
        "enable_cuda_graph": "1",
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "enable_skip_layer_norm_strict_mode": "1",  # otherwise squares are summed in float16
    }
    try:
        session = _open(graph, options, [(_PROVIDER, cuda), "CPUExecutionProvider"])
    except BuildError as error:
        if "graph capture" not in str(error).lower():
            raise
        warn_once(f"decoding is slower: {graph.name} cannot be captured as a CUDA graph ({reason(error)})")
        session = _open(graph, options, [(_PROVIDER, cuda | {"enable_cuda_graph": "0"}), "CPUExecutionProvider"])
    if session.get_providers()[0] != _PROVIDER:
        raise BuildError(
            f"the CUDA provider of ONNX Runtime does not load ({_load_failure()}); install it, {_ALTERNATIVE}"
        )
    return session


def _open(graph: Path, options: Any, providers: list[Any]) -> Any:
    ort.set_default_logger_severity(4)  # a provider that does not load logs several lines to standard error
    try:
        return ort.InferenceSession(str(graph), options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions share no public base class
        raise BuildError(f"ONNX Runtime refuses {graph.name} ({reason(error)}); export it again") from None
    finally:
        ort.set_default_logger_severity(2)


def _load_failure() -> str:
    """Return why the provider's library does not load; another process tries it, where a crash does no harm."""
    library = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    program = (
        "import ctypes, sys\nfrom coatrt.engines.runtime.cuda_session import _load_libraries\n"
        "_load_libraries()\nctypes.CDLL(sys.argv[1])"
    )
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        process = subprocess.run(
            [sys.executable, "-c", program, str(library)], capture_output=True, text=True, timeout=60, check=False
        )
        if match := re.search(r"(\S+): cannot open shared object file", process.stderr):
            return f"{match[1]} is missing"
    return "see ONNX Runtime's requirements for CUDA"
