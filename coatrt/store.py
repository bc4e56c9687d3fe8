"""Encoded matrices, made once per (matrix, format) and kept: in memory up to a bound, and on disk."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from coatrt.checkpoint import Checkpoint, cache_directory
from coatrt.files import atomic_file
from coatrt.formats import WeightFormat
from coatrt.quantize import QUANTIZER_VERSION, QuantizedMatrix, ScaleRule, encode

__all__ = ["CodeStore"]


class CodeStore:
    """The encoded matrices of one checkpoint.

    Args:
        checkpoint: where the weights come from.
        root: directory of the disk cache, shared between checkpoints; None keeps codes in memory only.
        scales: how block scales are chosen, see `encode`.
        memory_bytes: most bytes of codes kept in memory; the least recently used go first.
    """

    def __init__(
        self, checkpoint: Checkpoint, root: Path | None = None, scales: ScaleRule = "mse", memory_bytes: int = 4 << 30
    ) -> None:
        self.checkpoint = checkpoint
        self.scales: ScaleRule = scales
        self._root = root / checkpoint.fingerprint / f"v{QUANTIZER_VERSION}-{scales}" if root is not None else None
        self._limit = memory_bytes
        self._held: OrderedDict[tuple[str, str], QuantizedMatrix] = OrderedDict()
        self._bytes = 0

    @classmethod
    def default(cls, checkpoint: Checkpoint, memory_bytes: int = 4 << 30) -> "CodeStore":
        """Return a store on the user's cache directory."""
        return cls(checkpoint, cache_directory() / "codes", memory_bytes=memory_bytes)

    def get(self, name: str, weight_format: WeightFormat | str) -> QuantizedMatrix:
        """Return matrix `name` in a format, from memory, disk, or by encoding the checkpoint's weight.

        Raises:
            CheckpointError: the checkpoint lacks the matrix.
            FormatError: the weight cannot be held in the format.
        """
        matrix = self.checkpoint.matrices.by_name[name]
        fmt = WeightFormat.parse(weight_format).effective(matrix.K)
        key = (name, str(fmt))
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        path = self._root / str(fmt) / f"{name}.safetensors" if self._root is not None and fmt.has_scales else None
        found = _read(path, fmt, matrix.N, matrix.K) if path is not None and path.is_file() else None
        if found is None:
            found = encode(self.checkpoint.tensor(f"{name}.weight"), fmt, self.scales)
            if path is not None:
                _write(path, found)
        self._keep(key, found)
        return found

    def _keep(self, key: tuple[str, str], matrix: QuantizedMatrix) -> None:
        size = matrix.codes.nbytes + (matrix.scales.nbytes if matrix.scales is not None else 0)
        if size > self._limit:
            return
        self._held[key] = matrix
        self._bytes += size
        while self._bytes > self._limit:
            _, old = self._held.popitem(last=False)
            self._bytes -= old.codes.nbytes + (old.scales.nbytes if old.scales is not None else 0)


def _write(path: Path, matrix: QuantizedMatrix) -> None:
    tensors: dict[str, torch.Tensor] = {"codes": matrix.codes.contiguous()}
    if matrix.scales is not None:
        tensors["scales"] = matrix.scales.contiguous()
    if matrix.super_scales is not None:
        tensors["super_scales"] = matrix.super_scales
    with atomic_file(path) as temporary:
        save_file(tensors, str(temporary), metadata={"constant": matrix.constant.hex()})


def _read(path: Path, fmt: WeightFormat, N: int, K: int) -> QuantizedMatrix | None:
    """Return the matrix in a cache file, or None where the file is damaged and has to be made again."""
    try:
        with safe_open(str(path), framework="pt") as shard:
            tensors: dict[str, Any] = {name: shard.get_tensor(name).clone() for name in shard.keys()}  # noqa: SIM118
            constant = float.fromhex((shard.metadata() or {})["constant"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
    if tensors.get("codes") is None or tuple(tensors["codes"].shape) != (N, fmt.padded(K)):
        return None
    return QuantizedMatrix(fmt, N, K, tensors["codes"], tensors.get("scales"), tensors.get("super_scales"), constant)
