"""Buffers at fixed addresses for a decoder's inputs, caches and LoRA: on the CPU here, on a GPU in `cuda_driver`."""

import ctypes
from abc import ABC, abstractmethod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["ALIGNMENT", "HostMemory", "Memory", "aligned"]

ALIGNMENT = 256
"""Bytes that every piece of a buffer is aligned to, as CUDA's own allocations are."""


def aligned(nbytes: int) -> int:
    """Return a size that whole pieces fill."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Memory(ABC):
    """Buffers of one device; they live as long as this object."""

    device: Literal["cpu", "cuda"]
    stream = 0
    """The stream that orders copies and runs; 0 on the CPU."""

    @abstractmethod
    def beside(self) -> "Memory":
        """Return another memory of this device, whose copies are ordered with those of this one."""

    @abstractmethod
    def allocate(self, nbytes: int) -> int:
        """Return the address of a new buffer on the device, full of zeros."""

    @abstractmethod
    def host(self, nbytes: int) -> NDArray[np.uint8]:
        """Return an array of zeros on the host from which copies are fast."""

    @abstractmethod
    def write(self, address: int, data: NDArray[Any]) -> None:
        """Copy a contiguous array to the device; it may be reused after `synchronize`."""

    @abstractmethod
    def read(self, address: int, data: NDArray[Any]) -> None:
        """Fill a contiguous array from the device; it is filled after `synchronize`."""

    @abstractmethod
    def clear(self, address: int, nbytes: int) -> None:
        """Fill a buffer with zeros."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for everything that was started."""

    def enter(self) -> None:  # noqa: B027 - a GPU's memory has something to do here
        """Make the device current in this thread."""


class HostMemory(Memory):
    """Buffers on the CPU."""

    device = "cpu"

    def __init__(self) -> None:
        self._buffers: list[NDArray[np.uint8]] = []

    def beside(self) -> "HostMemory":
        """Return another one."""
        return HostMemory()

    def allocate(self, nbytes: int) -> int:
        """Return the address of a new buffer, full of zeros."""
        buffer = np.zeros(nbytes + ALIGNMENT, np.uint8)
        self._buffers.append(buffer)
        return aligned(buffer.ctypes.data)

    def host(self, nbytes: int) -> NDArray[np.uint8]:
        """Return an array."""
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
        """Nothing is pending."""
