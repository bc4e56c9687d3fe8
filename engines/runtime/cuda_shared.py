"""One session of the cuda form for all decoders of one content: the weights are on the GPU once."""

import itertools
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

from coatrt.engines.runtime.cuda_driver import CudaDriver, DeviceMemory
from coatrt.engines.runtime.cuda_session import cuda_session
from coatrt.engines.runtime.memory import HostMemory, Memory

__all__ = ["SharedSession", "shared_session"]

_open: "weakref.WeakValueDictionary[tuple[str, str], SharedSession]" = weakref.WeakValueDictionary()
_opening = threading.Lock()  # one thread at a time loads weights


class SharedSession:
    """A session on a stream, over which decoders take turns: each has buffers, bindings and a CUDA graph of its own.

    ONNX Runtime keeps a captured graph under its number, with the addresses it was captured with, and has no call that
    forgets it: a number is never used again. It keeps graphs for each thread apart, so that a decoder which moves to
    another thread is captured there once more.

    Args:
        graph: the cuda form.
        driver: of the GPU; None for the CPU.

    Raises:
        BuildError: see `cuda_session`.
    """

    def __init__(self, graph: Path, driver: CudaDriver | None) -> None:
        self._memory: Memory = HostMemory() if driver is None else DeviceMemory(driver)
        self.session = cuda_session(graph, self._memory)
        self.lock = threading.Lock()
        """Held for a whole step: a stream that is captured takes no other work, and nobody may allocate meanwhile."""
        self._numbers = itertools.count(1)

    def memory(self) -> Memory:
        """Return a memory for the buffers of one decoder."""
        return self._memory.beside()

    def graph_number(self) -> str:
        """Return a number for the captured steps of one decoder."""
        return str(next(self._numbers))


def shared_session(
    graph: Path, content: str, driver: CudaDriver | None, check: Callable[[bool], None]
) -> SharedSession:
    """Return the session that runs the same content already, or a new one.

    Args:
        graph: the cuda form.
        content: hashes of the graph and its weights; empty for a session that nobody else gets.
        driver: of the GPU; None for the CPU.
        check: called before anything is loaded, with whether the weights are there already; refuses what cannot fit.

    Raises:
        BuildError: see `cuda_session`, and what `check` refuses.
    """
    key = (content, "cpu" if driver is None else "cuda")
    with _opening:
        made = _open.get(key) if content else None
        check(made is not None)
        if made is None:
            made = SharedSession(graph, driver)
            if content:
                _open[key] = made
        return made
