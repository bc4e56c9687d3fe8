"""The NVIDIA driver through ctypes: the GPU and its free memory, buffers, streams and copies.

libcuda comes with the driver, so this works without any CUDA library and can say which one is missing.
"""

import ctypes
import functools
import sys
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coatrt.engines.runtime.memory import Memory
from coatrt.errors import BuildError

__all__ = ["CudaDriver", "DeviceMemory", "open_driver"]

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_NO_DEVICE, _OUT_OF_MEMORY = 100, 2
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_…
_NON_BLOCKING = 1  # the stream does not wait for the default stream
_ALTERNATIVE = "run the bundle with --backend ort"

_Size, _Pointer, _Address = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_uint64
_SIGNATURES: dict[str, list[Any]] = {
    "cuInit": [ctypes.c_uint],
    "cuDeviceGetCount": [_Pointer],
    "cuDeviceGet": [_Pointer, ctypes.c_int],
    "cuDeviceGetAttribute": [_Pointer, ctypes.c_int, ctypes.c_int],
    "cuDevicePrimaryCtxRetain": [_Pointer, ctypes.c_int],
    "cuCtxSetCurrent": [_Pointer],
    "cuMemGetInfo_v2": [_Pointer, _Pointer],
    "cuMemAlloc_v2": [_Pointer, _Size],
    "cuMemFree_v2": [_Address],
    "cuMemHostAlloc": [_Pointer, _Size, ctypes.c_uint],
    "cuMemFreeHost": [_Pointer],
    "cuMemsetD8Async": [_Address, ctypes.c_ubyte, _Size, _Pointer],
    "cuMemcpyHtoDAsync_v2": [_Address, _Pointer, _Size, _Pointer],
    "cuMemcpyDtoHAsync_v2": [_Pointer, _Address, _Size, _Pointer],
    "cuStreamCreate": [_Pointer, ctypes.c_uint],
    "cuStreamSynchronize": [_Pointer],
    "cuGetErrorString": [ctypes.c_int, _Pointer],
}


@functools.cache
def open_driver() -> "CudaDriver":
    """Return the driver with its first visible GPU.

    Raises:
        BuildError: there is no driver or no GPU, or the driver fails.
    """
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        raise BuildError(f"no NVIDIA driver here ({_LIBRARY} is missing); {_ALTERNATIVE}") from None
    return CudaDriver(library)


class CudaDriver:
    """The driver's calls, on its first visible GPU.

    Args:
        library: libcuda.

    Raises:
        BuildError: there is no visible GPU, or the driver fails.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        self.declare(_SIGNATURES)
        status = library.cuInit(0)
        if status not in (0, _NO_DEVICE):
            raise BuildError(
                f"the NVIDIA driver does not start ({self.reason(status)}); reinstall it, or {_ALTERNATIVE}"
            )
        count, device = ctypes.c_int(0), ctypes.c_int(0)
        if status == 0:
            self.call("cuDeviceGetCount", ctypes.byref(count))
        if count.value == 0:
            raise BuildError(f"no NVIDIA GPU here; {_ALTERNATIVE}")
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        parts = []
        for attribute in (_MAJOR, _MINOR):
            value = ctypes.c_int(0)
            self.call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
            parts.append(value.value)
        self.sm = 10 * parts[0] + parts[1]
        self._device, self._context = device, ctypes.c_void_p()
        self._streams: list[int] = []

    def declare(self, signatures: Mapping[str, list[Any]]) -> None:
        """Declare the argument types of driver calls.

        Raises:
            BuildError: the driver lacks one of them.
        """
        for name, arguments in signatures.items():
            function = getattr(self._library, name, None)
            if function is None:
                raise BuildError(f"the NVIDIA driver is too old (it has no {name}); update it, or {_ALTERNATIVE}")
            function.argtypes, function.restype = arguments, ctypes.c_int

    def reason(self, status: int) -> str:
        """Return the driver's text for a status code."""
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(status, ctypes.byref(text))
        return (text.value or b"").decode(errors="replace") or f"error {status}"

    def status(self, name: str, *arguments: Any) -> int:
        """Make a call and return its status for the caller to handle; 0 is success."""
        return int(getattr(self._library, name)(*arguments))

    def call(self, name: str, *arguments: Any) -> None:
        """Make a call.

        Raises:
            BuildError: it fails.
        """
        status = self.status(name, *arguments)
        if status == _OUT_OF_MEMORY:
            raise BuildError(f"not enough GPU or host memory ({name}); use a shorter --context or a smaller batch")
        if status:
            raise BuildError(f"the NVIDIA driver fails ({name}: {self.reason(status)}); {_ALTERNATIVE}")

    def enter(self) -> None:
        """Make the GPU's primary context current in this thread; ONNX Runtime and torch use the same context."""
        if not self._context:
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self.call("cuCtxSetCurrent", self._context)

    def memory(self) -> tuple[int, int]:
        """Return the free and the total memory of the GPU, in bytes."""
        self.enter()
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def take_stream(self) -> int:
        """Return a stream; `give_stream` takes it back for reuse. It is never destroyed: a session may still use it."""
        if self._streams:
            return self._streams.pop()
        stream = ctypes.c_void_p()
        self.call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        return int(stream.value or 0)

    def give_stream(self, stream: int) -> None:
        """Return an idle stream for reuse."""
        self._streams.append(stream)

    def allocate(self, nbytes: int) -> int:
        """Return the address of a new buffer on the GPU."""
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), nbytes)
        return int(address.value)

    def allocate_host(self, nbytes: int) -> int:
        """Return the address of new page-locked host memory."""
        address = ctypes.c_void_p()
        self.call("cuMemHostAlloc", ctypes.byref(address), nbytes, 0)
        return int(address.value or 0)

    def write(self, address: int, data: NDArray[Any], stream: int) -> None:
        """Start a copy to the GPU."""
        self.call("cuMemcpyHtoDAsync_v2", address, data.ctypes.data, data.nbytes, stream)

    def read(self, address: int, data: NDArray[Any], stream: int) -> None:
        """Start a copy from the GPU."""
        self.call("cuMemcpyDtoHAsync_v2", data.ctypes.data, address, data.nbytes, stream)

    def clear(self, address: int, nbytes: int, stream: int) -> None:
        """Start filling a buffer with zeros."""
        self.call("cuMemsetD8Async", address, 0, nbytes, stream)

    def synchronize(self, stream: int) -> None:
        """Wait for all work on a stream."""
        self.call("cuStreamSynchronize", stream)

    def free(self, address: int) -> None:
        """Free a GPU buffer; failures are ignored, as they only happen when the process ends."""
        self._library.cuCtxSetCurrent(self._context)
        self._library.cuMemFree_v2(address)

    def free_host(self, address: int) -> None:
        """Free page-locked host memory."""
        self._library.cuCtxSetCurrent(self._context)
        self._library.cuMemFreeHost(address)


class _PageLocked:
    """Page-locked memory, freed with the last array that views it."""

    def __init__(self, driver: CudaDriver, nbytes: int) -> None:
        address = driver.allocate_host(max(nbytes, 1))
        self.__array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}
        weakref.finalize(self, driver.free_host, address).atexit = False


class DeviceMemory(Memory):
    """Buffers on the GPU, copied on one stream.

    Args:
        driver: the GPU.
        stream: the stream of another memory that outlives this one; None takes a new stream.

    Raises:
        BuildError: the driver fails.
    """

    device = "cuda"

    def __init__(self, driver: CudaDriver, stream: int | None = None) -> None:
        self._driver = driver
        driver.enter()
        if stream is None:
            stream = driver.take_stream()
            weakref.finalize(self, driver.give_stream, stream).atexit = False
        self.stream = stream

    def sibling(self) -> "DeviceMemory":
        """Return a new memory on the same stream; its buffers live as long as it does."""
        return DeviceMemory(self._driver, self.stream)

    def enter(self) -> None:
        """Make the GPU current in this thread."""
        self._driver.enter()

    def allocate(self, nbytes: int) -> int:
        """Return the address of a new buffer, filled with zeros."""
        address = self._driver.allocate(max(nbytes, 1))
        weakref.finalize(self, self._driver.free, address).atexit = False
        self.clear(address, nbytes)
        return address

    def host(self, nbytes: int) -> NDArray[np.uint8]:
        """Return a page-locked array of zeros."""
        array = np.asarray(_PageLocked(self._driver, nbytes))
        array.fill(0)
        return array

    def write(self, address: int, data: NDArray[Any]) -> None:
        """Start a copy to the GPU."""
        if data.nbytes:
            self._driver.write(address, data, self.stream)

    def read(self, address: int, data: NDArray[Any]) -> None:
        """Start a copy from the GPU."""
        if data.nbytes:
            self._driver.read(address, data, self.stream)

    def clear(self, address: int, nbytes: int) -> None:
        """Start filling a buffer with zeros."""
        if nbytes:
            self._driver.clear(address, nbytes, self.stream)

    def synchronize(self) -> None:
        """Wait for all copies and runs on the stream."""
        self._driver.synchronize(self.stream)
