"""A step as a CUDA graph: the work of a stream is captured once, then launched as one call."""

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
_THREAD_LOCAL = 1  # other threads, such as those that compile kernels, may allocate memory during the capture


def _destroy(driver: CudaDriver, executable: ctypes.c_void_p) -> None:
    with contextlib.suppress(BuildError):  # failures only happen when the process ends
        driver.enter()
        driver.status("cuGraphExecDestroy", executable)


class CudaGraph:
    """Captured work; every buffer it reads or writes must keep its address.

    Args:
        driver: the GPU, current in this thread.
        stream: an idle stream.
        enqueue: adds the work to the stream; it is captured, not run.

    Raises:
        BuildError: the work cannot be captured; the stream is usable again. The message is the reason alone.
    """

    def __init__(self, driver: CudaDriver, stream: int, enqueue: Callable[[], None]) -> None:
        driver.declare(_SIGNATURES)
        self._driver, self._stream = driver, stream
        graph, self._executable = _Pointer(), _Pointer()
        self._check("cuStreamBeginCapture_v2", stream, _THREAD_LOCAL)
        try:
            try:
                enqueue()
            finally:  # otherwise the stream stays in capture mode and runs nothing any more
                status = driver.status("cuStreamEndCapture", stream, ctypes.byref(graph))
            if status:
                raise BuildError(f"cuStreamEndCapture: {driver.reason(status)}")
            self._check("cuGraphInstantiateWithFlags", ctypes.byref(self._executable), graph, 0)
        finally:
            if graph:
                driver.status("cuGraphDestroy", graph)
        weakref.finalize(self, _destroy, driver, self._executable).atexit = False

    def _check(self, name: str, *arguments: Any) -> None:
        if status := self._driver.status(name, *arguments):
            raise BuildError(f"{name}: {self._driver.reason(status)}")

    def launch(self) -> None:
        """Start the captured work.

        Raises:
            BuildError: the driver fails.
        """
        self._driver.call("cuGraphLaunch", self._executable, self._stream)
