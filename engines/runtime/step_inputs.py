"""What changes with every step, in one buffer of the device: a step's inputs are one copy from page-locked memory."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coatrt.engines.runtime.memory import Memory, aligned

__all__ = ["Place", "StepInputs"]

Place = tuple[int, tuple[int, ...], "np.dtype[Any]"]
"""Address on the device, shape, dtype."""


class StepInputs:
    """The inputs of a step, one behind the other.

    Args:
        memory: holds the buffer and the array it is copied from.
        inputs: name → shape, None for the tokens of a step, and dtype.
        most: tokens of the longest step.
    """

    def __init__(
        self, memory: Memory, inputs: Mapping[str, tuple[tuple[int | None, ...], "np.dtype[Any]"]], most: int
    ) -> None:
        self._memory, self._inputs = memory, dict(inputs)
        nbytes = sum(aligned(math.prod(shape) * dtype.itemsize) for _, shape, dtype in self._places(0, most).values())
        self.address = memory.allocate(nbytes)
        self._staging = memory.host(nbytes)

    def _places(self, address: int, room: int) -> dict[str, Place]:
        places: dict[str, Place] = {}
        for name, (shape, dtype) in self._inputs.items():
            sizes = tuple(room if size is None else size for size in shape)
            places[name] = address, sizes, dtype
            address += aligned(math.prod(sizes) * dtype.itemsize)
        return places

    def places(self, room: int) -> dict[str, Place]:
        """Return where each input lies in steps that are written with this room."""
        return self._places(self.address, room)

    def write(self, values: Mapping[str, NDArray[Any]], room: int) -> None:
        """Start the copy of a step's inputs; the next one may be written after `Memory.synchronize`.

        Args:
            values: name → array; more of them than the inputs are passed over.
            room: tokens that the places leave room for, at least those of this step.
        """
        end = 0
        for name, (offset, _, dtype) in self._places(0, room).items():
            value = values[name]
            end = offset + value.size * dtype.itemsize
            self._staging[offset:end].view(dtype)[...] = value.reshape(-1)
        self._memory.write(self.address, self._staging[:end])
