"""Encoded matrices, made once per (matrix, format, quantizer) and kept: in memory while there is room, and on disk."""

from collections import OrderedDict
from pathlib import Path

import torch

from coatrt.errors import ConfigError
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.matrices import EMBEDDING
from coatrt.quantization.codec import QuantizedMatrix, encode
from coatrt.quantization.gptq import InverseFactors
from coatrt.quantization.input_moments import Calibration, InputMoments
from coatrt.quantization.quantizers import CALIBRATED, QUANTIZER_VERSION, Quantizer
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.disk import cache_directory, cache_writing, cached
from coatrt.system.progress import Progress, silent
from coatrt.system.resources import free_memory
from coatrt.system.scratch import sweep
from coatrt.system.tensors import read_tensors, write_tensors

__all__ = ["CodeStore"]

_CPU = torch.device("cpu")
_LEAST = 1 << 30  # bytes of codes kept whatever else the machine does
_LEFT_FREE = 4 << 30  # bytes of memory that codes leave to others


class CodeStore:
    """The encoded matrices of one checkpoint.

    A table (head, tied embedding) is encoded for what the head reads; an embedding with a head of its own reads token
    ids, so it is encoded with "mse", as all tables are where the quantizer is "absmax". Codes are kept in the user's
    cache directory, and in memory as long as 4 GiB of it are free, 1 GiB of them at least; the least recently used go
    first.

    Args:
        checkpoint: where the weights come from.
        quantizer: how scales and codes are chosen, see `encode`.
        calibration: tokens for the quantizers that need second moments; these are measured when the first matrix that
            is not in the cache asks for them.
        progress: called while second moments are measured.
        compute: torch device that encodes and measures moments; codes are handed out on the CPU.

    Raises:
        ConfigError: the quantizer needs a calibration and none is given.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        quantizer: Quantizer = "mse",
        calibration: Calibration | None = None,
        progress: Progress = silent,
        compute: str | torch.device = "cpu",
    ) -> None:
        if quantizer in CALIBRATED and calibration is None:
            raise ConfigError(f"the quantizer {quantizer} is given without calibration tokens; give some, or use mse")
        self.checkpoint = checkpoint
        self.quantizer: Quantizer = quantizer
        self._compute = torch.device(compute)
        self._root = cache_directory() / "codes" / checkpoint.fingerprint
        for folder in cached(self._root, "*/*"):
            sweep(folder)
        self._key = f"v{QUANTIZER_VERSION}-{quantizer}"
        self._moments: InputMoments | None = None
        self._tokens: int | None = None
        if quantizer in CALIBRATED and calibration is not None:
            self._tokens = calibration.tokens.numel()
            self._key += f"-{calibration.hash}"
            self._moments = InputMoments(checkpoint, calibration, progress, self._compute)
        self._factors = InverseFactors()
        self._held: OrderedDict[tuple[str, str], QuantizedMatrix] = OrderedDict()
        self._bytes = 0

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
        kind = f"v{QUANTIZER_VERSION}-mse" if self._is_plain(name) else self._key
        path = self._root / kind / str(fmt) / f"{name}.safetensors"
        place = path.relative_to(self._root.parent).as_posix()  # a file under another name is another matrix
        found = _read(path, place, fmt, matrix.N, matrix.K) if fmt.has_scales else None
        if found is None:
            found = self._encode(name, fmt)
            if fmt.has_scales:
                with cache_writing():
                    write_tensors(path, found.tensors, {"constant": found.constant.hex(), "place": place})
        self._held[key] = found
        self._bytes += found.nbytes
        while self._bytes > _LEAST and free_memory() < _LEFT_FREE:
            self._bytes -= self._held.popitem(last=False)[1].nbytes
        return found

    def release(self) -> None:
        """Free the memory that only encoding takes, of the last moment and its factor: gigabytes on a training GPU."""
        self._factors = InverseFactors()
        if self._moments is not None:
            self._moments.release()

    def _encode(self, name: str, fmt: WeightFormat) -> QuantizedMatrix:
        weight = self.checkpoint.tensor(f"{name}.weight").to(self._compute)
        if self._is_plain(name):
            return encode(weight, fmt, "mse").to(_CPU)
        moment = self._moments.get(name) if self._moments is not None and fmt.has_scales else None
        return encode(weight, fmt, self.quantizer, moment, self._tokens, self._factors).to(_CPU)

    def _is_plain(self, name: str) -> bool:
        """Return whether a matrix is a table that no second moment speaks of."""
        matrices = self.checkpoint.matrices
        if not matrices.by_name[name].is_table:
            return False
        return self._moments is None or (name == EMBEDDING and not matrices.tied)


def _read(path: Path, place: str, fmt: WeightFormat, N: int, K: int) -> QuantizedMatrix | None:
    """Return the matrix in a cache file, or None where the file is missing or damaged and has to be made again."""
    found = read_tensors(path)
    if found is None:
        return None
    tensors, metadata = found
    try:
        codes, constant = tensors["codes"], float.fromhex(metadata["constant"])
    except (KeyError, ValueError):
        return None
    if metadata.get("place") != place or codes.shape != (N, fmt.padded(K)):
        return None
    return QuantizedMatrix(fmt, N, K, codes, tensors.get("scales"), tensors.get("super_scales"), constant)
