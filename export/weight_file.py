"""`weights.bin`: the one file that holds the weights of every graph of a model, each distinct tensor once."""

import hashlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

__all__ = ["WEIGHTS_FILE", "WeightFile"]

WEIGHTS_FILE = "weights.bin"
_PAGE = 4096  # a runtime maps large tensors: they start on a page
_LINE = 64  # small ones start on a cache line
_LARGE = 1 << 20
_PIECE = 1 << 24


class WeightFile:
    """An append-only file of tensors, addressed by content: equal bytes are stored once, whatever their name or dtype.

    Args:
        directory: where `weights.bin` is written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.size = 0
        self._places: dict[bytes, tuple[int, int]] = {}
        self._stream: BinaryIO | None = None

    def __enter__(self) -> "WeightFile":
        self._stream = (self.directory / WEIGHTS_FILE).open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def add(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Store the bytes of `tensor` unless they are stored already; nothing of it stays in memory.

        Args:
            tensor: contiguous, any dtype.

        Returns:
            offset and length in the file, in bytes.
        """
        data = tensor.reshape(-1).view(torch.uint8).numpy().data
        digest = hashlib.sha256(data).digest()
        if digest not in self._places:
            assert self._stream is not None, "a weight file is written inside its with block"
            padding = -self.size % (_PAGE if len(data) >= _LARGE else _LINE)
            self._stream.write(bytes(padding))
            for start in range(0, len(data), _PIECE):
                self._stream.write(data[start : start + _PIECE])
            self._places[digest] = (self.size + padding, len(data))
            self.size += padding + len(data)
        return self._places[digest]
