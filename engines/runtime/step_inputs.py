"""The inputs that change with every step, in one device buffer: one copy from page-locked memory updates them all."""

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
    """The inputs of a step, one after another in one buffer.

    Args:
        memory: allocates the device buffer and the host array it is copied from.
        inputs: name → (shape, dtype); a size of None stands for the tokens of the step.
        max_tokens: tokens of the longest step.
    """

    def __init__(
        self, memory: Memory, inputs: Mapping[str, tuple[tuple[int | None, ...], "np.dtype[Any]"]], max_tokens: int
    ) -> None:
        self._memory, self._inputs = memory, dict(inputs)
        places = self._places(0, max_tokens).values()
        nbytes = sum(aligned(math.prod(shape) * dtype.itemsize) for _, shape, dtype in places)
        self.address = memory.allocate(nbytes)
        self._staging = memory.host(nbytes)

    def _places(self, address: int, tokens: int) -> dict[str, Place]:
        places: dict[str, Place] = {}
        for name, (shape, dtype) in self._inputs.items():
            sizes = tuple(tokens if size is None else size for size in shape)
            places[name] = address, sizes, dtype
            address += aligned(math.prod(sizes) * dtype.itemsize)
        return places

    def places(self, tokens: int) -> dict[str, Place]:
        """Return the place of each input in the layout for `tokens` tokens."""
        return self._places(self.address, tokens)

    def write(self, values: Mapping[str, NDArray[Any]], tokens: int) -> None:
        """Start the copy of a step's inputs; the next one may be written after `Memory.synchronize`.

        Args:
            values: name → array; names that are not inputs are ignored.
            tokens: tokens of the layout, at least those of this step; `places` gives the addresses for the same number.
        """
        end = 0
        for name, (offset, _, dtype) in self._places(0, tokens).items():
            value = values[name]
            end = offset + value.size * dtype.itemsize
            self._staging[offset:end].view(dtype)[...] = value.reshape(-1)
        self._memory.write(self.address, self._staging[:end])
