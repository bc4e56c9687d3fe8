"""One session per distinct graph and weights, shared by all decoders, so that the weights are on the GPU once."""

import itertools
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

from coatrt.engines.runtime.cuda_driver import CudaDriver, DeviceMemory
from coatrt.engines.runtime.cuda_session import cuda_session
from coatrt.engines.runtime.memory import HostMemory, Memory

__all__ = ["SharedSession", "shared_session"]

_sessions: "weakref.WeakValueDictionary[tuple[str, str], SharedSession]" = weakref.WeakValueDictionary()
_load_lock = threading.Lock()  # one thread at a time loads weights


class SharedSession:
    """A session on one stream that decoders use in turn; each has its own buffers, bindings and CUDA graph.

    ONNX Runtime stores a captured graph and its addresses under a number and cannot delete it, so no number is used
    twice. It stores graphs per thread: a decoder that moves to another thread is captured there again.

    Args:
        graph: the cuda form.
        driver: the GPU; None for the CPU.

    Raises:
        BuildError: see `cuda_session`.
    """

    def __init__(self, graph: Path, driver: CudaDriver | None) -> None:
        self._memory: Memory = HostMemory() if driver is None else DeviceMemory(driver)
        self.session = cuda_session(graph, self._memory)
        self.lock = threading.Lock()
        """Locked for a whole step: while a stream is captured, no other work may use it and nothing may allocate."""
        self._numbers = itertools.count(1)

    def memory(self) -> Memory:
        """Return a memory for the buffers of one decoder."""
        return self._memory.sibling()

    def graph_number(self) -> str:
        """Return an unused number for the CUDA graph of one decoder."""
        return str(next(self._numbers))


def shared_session(
    graph: Path, content: str, driver: CudaDriver | None, check: Callable[[bool], None]
) -> SharedSession:
    """Return the open session of the same content, or a new one.

    Args:
        graph: the cuda form.
        content: hashes of the graph and its weights; empty for a session that is not shared.
        driver: the GPU; None for the CPU.
        check: called with whether the weights are on the GPU already, before anything is loaded; raises if the decoder
            does not fit.

    Raises:
        BuildError: see `cuda_session`; or `check` raised it.
    """
    key = (content, "cpu" if driver is None else "cuda")
    with _load_lock:
        session = _sessions.get(key) if content else None
        check(session is not None)
        if session is None:
            session = SharedSession(graph, driver)
            if content:
                _sessions[key] = session
        return session
