"""A fake of libcuda: buffers in host memory, a stream that runs only when it is waited for, and graphs."""

import ctypes
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["FakeDriver"]

NOT_IN_CAPTURE, INVALIDATED = 900, 901  # CUDA_ERROR_STREAM_CAPTURE_…


class FakeDriver:
    """The calls of libcuda, for `gpus` GPUs of compute capability `sm` with `free` bytes of free memory.

    Copies run only when the stream is waited for, so that code that reads or overwrites a buffer too early fails.

    Args:
        fails: name of a call → the status it returns.
    """

    def __init__(
        self,
        *,
        start: int = 0,
        gpus: int = 1,
        sm: int = 90,
        free: int = 1 << 40,
        fails: Mapping[str, int] | None = None,
    ) -> None:
        self.start, self.gpus, self.sm, self.free, self.fails = start, gpus, sm, free, dict(fails or {})
        self.buffers: dict[int, Any] = {}
        self.calls: Counter[str] = Counter()
        self.queue: list[Callable[[], None]] = []
        self.capture: list[Callable[[], None]] | None = None
        self.invalid = False
        self.graphs: dict[int, list[Callable[[], None]]] = {}

    def __getattr__(self, name: str) -> Callable[..., int]:
        if not name.startswith("cu"):
            raise AttributeError(name)
        function = {"cuInit": lambda *_: self.start, "cuGetErrorString": lambda *_: 1}.get(name)
        function = function or type(self).__dict__.get(f"_{name}", lambda *_: 0).__get__(self)

        def call(*arguments: Any) -> int:
            self.calls[name] += 1
            if name in self.fails and name != "cuStreamEndCapture":
                return self.fails[name]
            return int(function(*arguments) or 0)

        setattr(self, name, call)
        return call

    def enqueue(self, work: Callable[[], None]) -> None:
        """Add work to the stream, to run later or to be captured."""
        (self.queue if self.capture is None else self.capture).append(work)

    def _cuDeviceGetCount(self, count: Any) -> None:
        count._obj.value = self.gpus

    def _cuDeviceGetAttribute(self, value: Any, attribute: int, _: Any) -> None:
        value._obj.value = self.sm // 10 if attribute == 75 else self.sm % 10

    def _cuDevicePrimaryCtxRetain(self, context: Any, _: Any) -> None:
        context._obj.value = 7

    def _cuMemGetInfo_v2(self, free: Any, total: Any) -> None:
        free._obj.value, total._obj.value = self.free, 80 << 30

    def _new(self, address: Any, nbytes: int) -> int:
        if self.capture is not None:
            self.invalid = True
            return NOT_IN_CAPTURE
        if nbytes > self.free:
            return 2
        buffer = ctypes.create_string_buffer(nbytes + 256)
        start = -(-ctypes.addressof(buffer) // 256) * 256
        ctypes.memset(start, 0xAA, nbytes)
        address._obj.value = start
        self.buffers[start] = buffer
        return 0

    def _cuMemAlloc_v2(self, address: Any, nbytes: int) -> int:
        return self._new(address, nbytes)

    def _cuMemHostAlloc(self, address: Any, nbytes: int, _: int) -> int:
        return self._new(address, nbytes)

    def _cuMemFree_v2(self, address: int) -> None:
        self._cuStreamSynchronize(0)
        del self.buffers[address]

    def _cuMemFreeHost(self, address: int) -> None:
        self._cuMemFree_v2(address)

    def _cuMemsetD8Async(self, address: int, value: int, nbytes: int, _: int) -> None:
        self.enqueue(lambda: ctypes.memset(address, value, nbytes))

    def _cuMemcpyHtoDAsync_v2(self, to: int, source: int, nbytes: int, _: int) -> None:
        self.enqueue(lambda: ctypes.memmove(to, source, nbytes))

    def _cuMemcpyDtoHAsync_v2(self, to: int, source: int, nbytes: int, _: int) -> None:
        self.enqueue(lambda: ctypes.memmove(to, source, nbytes))

    def _cuStreamCreate(self, stream: Any, _: int) -> None:
        stream._obj.value = 11

    def _cuStreamSynchronize(self, _: int) -> int:
        if self.capture is not None:
            self.invalid = True
            return NOT_IN_CAPTURE
        queue, self.queue = self.queue, []
        for work in queue:
            work()
        return 0

    def _cuStreamBeginCapture_v2(self, _: int, mode: int) -> None:
        assert self.capture is None
        assert mode == 1, "other threads may allocate memory during the capture"
        assert not self.queue, "the stream must be idle before a capture"
        self.capture, self.invalid = [], False

    def _cuStreamEndCapture(self, _: int, graph: Any) -> int:
        captured, self.capture = self.capture, None
        assert captured is not None
        status = self.fails.get("cuStreamEndCapture", INVALIDATED if self.invalid else 0)
        if not status:
            graph._obj.value = 1000 + len(self.graphs)
            self.graphs[graph._obj.value] = captured
        return status

    def _cuGraphInstantiateWithFlags(self, made: Any, graph: Any, _: int) -> None:
        made._obj.value = graph.value + 1000
        self.graphs[made._obj.value] = self.graphs[graph.value]

    def _cuGraphLaunch(self, made: Any, _: int) -> None:
        for work in self.graphs[made.value]:
            self.enqueue(work)

    def _cuGraphDestroy(self, graph: Any) -> None:
        del self.graphs[graph.value]

    def _cuGraphExecDestroy(self, executable: Any) -> None:
        del self.graphs[executable.value]
