"""Buffers at fixed addresses for a decoder's inputs, caches and LoRA: on the CPU here, on the GPU in `cuda_driver`."""

import ctypes
from abc import ABC, abstractmethod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["ALIGNMENT", "HostMemory", "Memory", "aligned"]

ALIGNMENT = 256
"""Alignment of every section of a buffer, in bytes; that of CUDA's own allocations."""


def aligned(nbytes: int) -> int:
    """Return a size rounded up to `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Memory(ABC):
    """Buffers on one device; they live as long as this object."""

    device: Literal["cpu", "cuda"]
    stream = 0
    """The CUDA stream that orders copies and runs; 0 on the CPU."""

    @abstractmethod
    def sibling(self) -> "Memory":
        """Return a new memory on the same device and stream."""

    @abstractmethod
    def allocate(self, nbytes: int) -> int:
        """Return the address of a new device buffer, filled with zeros."""

    @abstractmethod
    def host(self, nbytes: int) -> NDArray[np.uint8]:
        """Return a host array of zeros from which copies to the device are fast."""

    @abstractmethod
    def write(self, address: int, data: NDArray[Any]) -> None:
        """Start copying a contiguous array to the device; the array may be reused after `synchronize`."""

    @abstractmethod
    def read(self, address: int, data: NDArray[Any]) -> None:
        """Start copying from the device to a contiguous array; its values are valid after `synchronize`."""

    @abstractmethod
    def clear(self, address: int, nbytes: int) -> None:
        """Fill a buffer with zeros."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for all copies and runs on the stream."""

    def enter(self) -> None:  # noqa: B027 - only a GPU's memory needs it
        """Make the device current in this thread."""


class HostMemory(Memory):
    """Buffers on the CPU."""

    device = "cpu"

    def __init__(self) -> None:
        self._buffers: list[NDArray[np.uint8]] = []

    def sibling(self) -> "HostMemory":
        """Return a new host memory."""
        return HostMemory()

    def allocate(self, nbytes: int) -> int:
        """Return the address of a new buffer, filled with zeros."""
        buffer = np.zeros(nbytes + ALIGNMENT, np.uint8)
        self._buffers.append(buffer)
        return aligned(buffer.ctypes.data)

    def host(self, nbytes: int) -> NDArray[np.uint8]:
        """Return an array of zeros."""
        return np.zeros(nbytes, np.uint8)

    def write(self, address: int, data: NDArray[Any]) -> None:
        """Copy an array into a buffer."""
        ctypes.memmove(address, data.ctypes.data, data.nbytes)

    def read(self, address: int, data: NDArray[Any]) -> None:
        """Fill an array from a buffer."""
        ctypes.memmove(data.ctypes.data, address, data.nbytes)

    def clear(self, address: int, nbytes: int) -> None:
        """Fill a buffer with zeros."""
        ctypes.memset(address, 0, nbytes)

    def synchronize(self) -> None:
        """Return at once: copies on the host are finished already."""
