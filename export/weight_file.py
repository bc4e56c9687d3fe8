"""`weights.bin`: one file with the weights of all graphs of a model; each distinct tensor is stored once."""

import hashlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

__all__ = ["WEIGHTS_FILE", "WeightFile"]

WEIGHTS_FILE = "weights.bin"
_PAGE = 4096  # alignment of large tensors, which runtimes map into memory
_LINE = 64  # alignment of small tensors: a cache line
_LARGE = 1 << 20
_CHUNK = 1 << 24


class WeightFile:
    """An append-only file of tensors, addressed by content: equal bytes are stored once, whatever their name or dtype.

    Args:
        directory: the directory of `weights.bin`.
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
        """Store the bytes of `tensor` unless they are stored already; no reference to it is kept.

        Args:
            tensor: contiguous, any dtype.

        Returns:
            offset and length in the file, in bytes.
        """
        data = tensor.reshape(-1).view(torch.uint8).numpy().data
        digest = hashlib.sha256(data).digest()
        if digest not in self._places:
            assert self._stream is not None, "use WeightFile in a with block"
            padding = -self.size % (_PAGE if len(data) >= _LARGE else _LINE)
            self._stream.write(bytes(padding))
            for start in range(0, len(data), _CHUNK):
                self._stream.write(data[start : start + _CHUNK])
            self._places[digest] = (self.size + padding, len(data))
            self.size += padding + len(data)
        return self._places[digest]
