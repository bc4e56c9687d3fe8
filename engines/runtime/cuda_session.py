"""ONNX Runtime's CUDA provider: its libraries are found, it serves this GPU, and a session that runs all on it."""

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

__all__ = ["SERVED", "check_provider", "cuda_session", "serves"]

SERVED = (75, 80, 86, 89, 90, 120)
"""Compute capabilities that onnxruntime-gpu 1.31 has machine code for; it has none that a driver could translate."""

_PROVIDER = "CUDAExecutionProvider"
_CUDA_LIBRARIES = ("cudart", "nvrtc", "nvJitLink", "cublasLt", "cublas", "curand", "cufft", "cudnn")
"""In an order in which each finds what it needs."""
_OTHERWISE = "or run the bundle with --backend ort"


def serves(sm: int) -> bool:
    """Return whether a GPU runs that machine code: of its own compute capability, or of a lower minor version."""
    return any(sm // 10 == served // 10 and sm >= served for served in SERVED)


def check_provider(driver: CudaDriver) -> None:
    """Refuse a GPU that the CUDA provider does not serve, or an ONNX Runtime that lacks it.

    Raises:
        BuildError: so it is.
    """
    if not serves(driver.sm):
        have = ", ".join(f"SM{sm}" for sm in SERVED)
        raise BuildError(f"this GPU is SM{driver.sm}, onnxruntime-gpu has code for {have}; run with --backend ort")
    if _PROVIDER not in ort.get_available_providers():
        raise BuildError(
            f"onnxruntime {ort.__version__} here is built without CUDA; install onnxruntime-gpu in its place, "
            f"{_OTHERWISE}"
        )


def _load_libraries() -> None:
    """Load CUDA's libraries where pip has put them: ONNX Runtime finds only what is loaded or on the system's path."""
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):  # it prints what it misses
            ort.preload_dlls()
    if sys.platform == "win32":
        return
    places: list[Path] = []
    for package, below in (("nvidia", "*/lib"), ("torch", "lib")):
        spec = importlib.util.find_spec(package)  # finds, does not import
        for root in spec.submodule_search_locations or () if spec is not None else ():
            places += sorted(Path(root).glob(below))
    for name in _CUDA_LIBRARIES:
        for path in (path for place in places for path in sorted(place.glob(f"lib{name}.so.*"))):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(path))


def cuda_session(graph: Path, memory: Memory) -> Any:
    """Return a session of the cuda form on the device of `memory`; on the CPU too, where tests look at its numbers.

    Args:
        graph: the model file.
        memory: the session runs on its stream.

    Raises:
        BuildError: the provider does not load, or refuses the graph.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what it refuses comes back as an error
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")  # the CUDA provider has one level
    if memory.device == "cpu":
        return _made(graph, options, ["CPUExecutionProvider"])
    _load_libraries()
    cuda = {
        "device_id": "0",
        "user_compute_stream": str(memory.stream),
        "enable_cuda_graph": "1",
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "enable_skip_layer_norm_strict_mode": "1",  # else squares are summed in float16
    }
    try:
        made = _made(graph, options, [(_PROVIDER, cuda), "CPUExecutionProvider"])
    except BuildError as error:
        if "graph capture" not in str(error).lower():
            raise
        warn_once(f"a decode step of {graph.name} is not captured as a CUDA graph, and is slower ({reason(error)})")
        made = _made(graph, options, [(_PROVIDER, cuda | {"enable_cuda_graph": "0"}), "CPUExecutionProvider"])
    if made.get_providers()[0] != _PROVIDER:
        raise BuildError(f"the CUDA provider of ONNX Runtime does not load ({_why_not()}); install it, {_OTHERWISE}")
    return made


def _made(graph: Path, options: Any, providers: list[Any]) -> Any:
    ort.set_default_logger_severity(4)  # of a provider that does not load it says several lines on standard error
    try:
        return ort.InferenceSession(str(graph), options, providers=providers)
    except Exception as error:  # onnxruntime raises types of its own that share no public base
        raise BuildError(f"ONNX Runtime refuses {graph.name} ({reason(error)}); export it again") from None
    finally:
        ort.set_default_logger_severity(2)


def _why_not() -> str:
    """Return why the provider's library does not load, as another process finds: there, a crash does no harm."""
    library = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    program = (
        "import ctypes, sys\nfrom coatrt.engines.runtime.cuda_session import _load_libraries\n"
        "_load_libraries()\nctypes.CDLL(sys.argv[1])"
    )
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            [sys.executable, "-c", program, str(library)], capture_output=True, text=True, timeout=60, check=False
        )
        if found := re.search(r"(\S+): cannot open shared object file", done.stderr):
            return f"{found[1]} is missing"
    return "see ONNX Runtime's requirements for CUDA"
