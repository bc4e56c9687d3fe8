"""A step as a CUDA graph: what a stream was given is captured once, and launched from then on."""

import contextlib
import ctypes
import weakref
from collections.abc import Callable
from typing import Any

from coatrt.engines.runtime.cuda_driver import CudaDriver
from coatrt.errors import BuildError

__all__ = ["CudaGraph"]

_Pointer = ctypes.c_void_p
_SIGNATURES: dict[str, list[Any]] = {
    "cuStreamBeginCapture_v2": [_Pointer, ctypes.c_int],
    "cuStreamEndCapture": [_Pointer, _Pointer],
    "cuGraphInstantiateWithFlags": [_Pointer, _Pointer, ctypes.c_uint64],
    "cuGraphLaunch": [_Pointer, _Pointer],
    "cuGraphDestroy": [_Pointer],
    "cuGraphExecDestroy": [_Pointer],
}
_THREAD_LOCAL = 1  # other threads, such as those that compile kernels, may go on reserving memory


def _destroy(driver: CudaDriver, made: ctypes.c_void_p) -> None:
    with contextlib.suppress(BuildError):  # at the end of a process nothing of this matters
        driver.enter()
        driver.status("cuGraphExecDestroy", made)


class CudaGraph:
    """Captured work; whatever it reads and writes must stay where it is.

    Args:
        driver: the GPU, current in this thread.
        stream: nothing runs on it.
        enqueue: gives it the work, which is captured and not run.

    Raises:
        BuildError: it cannot be captured, and the stream is as it was; the message is the reason alone.
    """

    def __init__(self, driver: CudaDriver, stream: int, enqueue: Callable[[], None]) -> None:
        driver.declare(_SIGNATURES)
        self._driver, self._stream = driver, stream
        graph, self._made = _Pointer(), _Pointer()
        self._check("cuStreamBeginCapture_v2", stream, _THREAD_LOCAL)
        try:
            try:
                enqueue()
            finally:  # else the stream stays in capture, and nothing runs on it any more
                ended = driver.status("cuStreamEndCapture", stream, ctypes.byref(graph))
            if ended:
                raise BuildError(f"cuStreamEndCapture: {driver.reason(ended)}")
            self._check("cuGraphInstantiateWithFlags", ctypes.byref(self._made), graph, 0)
        finally:
            if graph:
                driver.status("cuGraphDestroy", graph)
        weakref.finalize(self, _destroy, driver, self._made).atexit = False

    def _check(self, name: str, *arguments: Any) -> None:
        if status := self._driver.status(name, *arguments):
            raise BuildError(f"{name}: {self._driver.reason(status)}")

    def launch(self) -> None:
        """Start the captured work.

        Raises:
            BuildError: the driver fails.
        """
        self._driver.call("cuGraphLaunch", self._made, self._stream)
