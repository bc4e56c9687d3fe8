"""A LoRA in the dtype and layout of a decoder's buffer, so that switching to it is one copy."""

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coatrt.configs.lora_contract import LoraContract
from coatrt.devices.environment import usable_cores
from coatrt.engines.runtime.lora_file import Lora
from coatrt.engines.runtime.memory import aligned

__all__ = ["LoraLayout", "PackedLora"]

_LARGE = 1 << 20  # bytes above which starting threads pays off


class LoraLayout:
    """The layout of a graph's LoRA inputs in one buffer, each aligned, and of the contract's tensors within them.

    Args:
        contract: names and shapes; None for a graph without LoRA.
        dtype: dtype of the graph's LoRA inputs.
    """

    def __init__(self, contract: LoraContract | None, dtype: np.dtype[Any]) -> None:
        self.dtype, self.nbytes = dtype, 0
        self.pieces: dict[str, tuple[int, tuple[int, int]]] = {}
        """Input → (offset in bytes, shape)."""
        self._places = contract.places if contract is not None else {}
        self._shapes = contract.shapes if contract is not None else {}
        for name, shape in contract.inputs.items() if contract is not None else ():
            self.pieces[name] = self.nbytes, shape
            self.nbytes += aligned(math.prod(shape) * dtype.itemsize)

    def matches(self, other: "LoraLayout") -> bool:
        """Return whether both layouts are equal, so that one buffer serves both."""
        return (self.dtype, self.pieces) == (other.dtype, other.pieces)

    def views(self, buffer: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Return every tensor of the contract as a view of a buffer."""
        inputs = self.inputs(buffer)
        return {
            name: inputs[place.input][place.row : place.row + rows, place.column : place.column + columns]
            for (name, place), (rows, columns) in zip(self._places.items(), self._shapes.values(), strict=True)
        }

    def inputs(self, buffer: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Return every input of the graph as a view of a buffer."""
        return {
            name: buffer[offset : offset + math.prod(shape) * self.dtype.itemsize].view(self.dtype).reshape(shape)
            for name, (offset, shape) in self.pieces.items()
        }

    def fill(self, buffer: NDArray[np.uint8], tensors: Mapping[str, NDArray[Any]]) -> None:
        """Cast tensors into their places in a zero-filled buffer, in threads: numpy releases the lock while casting."""
        views = self.views(buffer)

        def cast(name: str) -> None:
            views[name][...] = tensors[name]

        with ThreadPoolExecutor(usable_cores() if self.nbytes > _LARGE else 1) as pool:
            for _ in pool.map(cast, views):
                pass


class PackedLora(Lora):
    """The tensors of a contract, cast, as views of one buffer; `DeviceDecoder.packed` returns one.

    Args:
        buffer: the tensors in `layout`; page-locked memory for a GPU.
        layout: the layout of the buffer.
        configuration: hash of the configuration they were emitted for.
    """

    def __init__(self, buffer: NDArray[np.uint8], layout: LoraLayout, configuration: str) -> None:
        super().__init__(layout.views(buffer), configuration)
        self.buffer, self.layout = buffer, layout
