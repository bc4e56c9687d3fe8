"""Encoded matrices, cached per (matrix, format, quantizer): on disk, and in memory while enough is free."""

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import torch

from coatrt.errors import CheckpointError, ConfigError
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.matrices import EMBEDDING
from coatrt.quantization.codec import QuantizedMatrix, encode
from coatrt.quantization.gptq import InverseFactors
from coatrt.quantization.grid import Grid
from coatrt.quantization.input_moments import Calibration, InputMoments
from coatrt.quantization.learned_scales import LearnedScales
from coatrt.quantization.quantizers import CALIBRATED, QUANTIZER_VERSION, Quantizer
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.disk import cache_directory, cache_writing, cached
from coatrt.system.progress import Progress, silent
from coatrt.system.resources import free_memory
from coatrt.system.scratch import sweep
from coatrt.system.tensors import read_tensors, write_tensors

__all__ = ["CodeStore"]

_CPU = torch.device("cpu")
_MIN_BYTES = 1 << 30  # bytes of codes kept in memory in any case
_RESERVE = 4 << 30  # bytes of free memory below which codes are dropped


class CodeStore:
    """The encoded matrices of one checkpoint.

    The head and a tied embedding are encoded for the input of the head. An untied embedding reads token ids, so it is
    encoded with "mse", as all tables are with the quantizer "absmax". Codes are kept in the user's cache directory and
    in memory, at least 1 GiB of them, more while 4 GiB are free; the least recently used are dropped first.

    Args:
        checkpoint: source of the weights.
        quantizer: choice of scales and codes, see `encode`.
        calibration: tokens for the quantizers that need second moments, which are measured once a matrix is not in the
            cache.
        progress: called while second moments are measured.
        compute: torch device that encodes and measures moments; codes are returned on the CPU.
        learned: scales in place of the quantizer's.

    Raises:
        ConfigError: the quantizer needs calibration tokens and has none.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        quantizer: Quantizer = "mse",
        calibration: Calibration | None = None,
        progress: Progress = silent,
        compute: str | torch.device = "cpu",
        learned: LearnedScales | None = None,
    ) -> None:
        if quantizer in CALIBRATED and calibration is None:
            raise ConfigError(f"the quantizer {quantizer} needs calibration tokens; give some, or use mse")
        self.checkpoint = checkpoint
        self.quantizer: Quantizer = quantizer
        self._learned = learned or LearnedScales()
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
        self._matrices: OrderedDict[tuple[str, str], QuantizedMatrix] = OrderedDict()
        self._bytes = 0

    def get(self, name: str, weight_format: WeightFormat | str) -> QuantizedMatrix:
        """Return matrix `name` in a format, from memory, from disk, or encoded from the checkpoint's weight.

        In the format that a quantized checkpoint stores it in, these are its own codes.

        Raises:
            CheckpointError: the checkpoint lacks the matrix.
            FormatError: the format cannot store the weight.
        """
        shape = self.checkpoint.matrices.by_name[name]
        fmt = WeightFormat.parse(weight_format).effective(shape.K)
        key = (name, str(fmt))
        if key in self._matrices:
            self._matrices.move_to_end(key)
            return self._matrices[key]
        if (matrix := self._stored(name, fmt)) is not None:
            return self._keep(key, matrix)
        if not fmt.has_scales:
            return self._keep(key, encode(self.checkpoint.tensor(f"{name}.weight").to(self._compute), fmt).to(_CPU))
        if (matrix := self._read(name, fmt)) is not None:
            return self._keep(key, matrix)
        for member, encoded in self._encode(name, fmt):
            path, place = self._place(member, fmt)
            with cache_writing():
                write_tensors(path, encoded.tensors, {"constant": encoded.constant.hex(), "place": place})
            if member == name:
                matrix = encoded
            else:
                self._keep((member, str(fmt)), encoded)
        assert matrix is not None
        return self._keep(key, matrix)

    def _place(self, name: str, fmt: WeightFormat) -> tuple[Path, str]:
        """Return the cache file of a matrix, and the identity stored in it, so that a renamed one is not read."""
        kind = f"v{QUANTIZER_VERSION}-mse" if self._is_plain(name) else self._key
        path = self._root / kind / str(fmt) / f"{name}.safetensors"
        return path, path.relative_to(self._root.parent).as_posix()

    def _read(self, name: str, fmt: WeightFormat) -> QuantizedMatrix | None:
        """Return a matrix from its cache file, or None if that is missing or damaged."""
        shape = self.checkpoint.matrices.by_name[name]
        return _read(*self._place(name, fmt), fmt, shape.N, shape.K)

    def _keep(self, key: tuple[str, str], matrix: QuantizedMatrix) -> QuantizedMatrix:
        """Keep a matrix with its learned scales in memory and return it."""
        if (old := self._matrices.pop(key, None)) is not None:  # its group is encoded again
            self._bytes -= old.nbytes
        self._matrices[key] = matrix = self._learned.apply(key[0], matrix)
        self._bytes += matrix.nbytes
        while self._bytes > _MIN_BYTES and free_memory() < _RESERVE:
            self._bytes -= self._matrices.popitem(last=False)[1].nbytes
        return matrix

    def _stored(self, name: str, fmt: WeightFormat) -> QuantizedMatrix | None:
        """Return a matrix as a quantized checkpoint stores it, if that is in this format; else None."""
        stored, shape = self.checkpoint.codes, self.checkpoint.matrices.by_name[name]
        if stored is None or not self.is_stored(name, fmt):
            return None
        codes, scales = stored.tensors(self.checkpoint.directory, name)
        blocks = fmt.padded(shape.K) // fmt.block if fmt.block else 1
        dtypes = (Grid(fmt.kind).dtype, torch.float8_e4m3fn if fmt.kind == "nvfp4" else torch.float16)
        shapes = ((shape.N, fmt.padded(shape.K)), (shape.N, blocks))
        if (codes.shape, scales.shape) != shapes or (codes.dtype, scales.dtype) != dtypes:
            raise CheckpointError(
                f"{self.checkpoint.directory}: the codes of {name} are not of {fmt}; remove the directory"
            )
        return QuantizedMatrix(fmt, shape.N, shape.K, codes, scales, None, stored.constants.get(name, 0.0))

    def is_stored(self, name: str, fmt: WeightFormat) -> bool:
        """Return whether a quantized checkpoint stores a matrix in this format."""
        stored = self.checkpoint.codes
        return stored is not None and stored.formats.get(name) == str(fmt)

    def use(self, learned: LearnedScales) -> None:
        """Take learned scales in place of those so far."""
        self._learned = learned
        self._matrices.clear()
        self._bytes = 0

    def release(self) -> None:
        """Free memory needed only for encoding, the last moment and its factor: gigabytes on a training GPU."""
        self._factors = InverseFactors()
        if self._moments is not None:
            self._moments.release()

    def _encode(self, name: str, fmt: WeightFormat) -> Iterator[tuple[str, QuantizedMatrix]]:
        """Yield a matrix, encoded, and those that are encoded with it.

        The matrices of a fused group are encoded as one: then they share their levels and nvfp4's tensor scale, so that
        one product serves them all in a graph.
        """
        if self._is_plain(name):
            yield name, encode(self.checkpoint.tensor(f"{name}.weight").to(self._compute), fmt, "mse").to(_CPU)
            return
        names = [name]
        if self.quantizer == "refined" and not fmt.scale_bits:  # blocks of double quantization cross rows
            group = next(group for group in self.checkpoint.matrices.groups if name in group)
            names = [other for other in group if not self.is_stored(other, fmt)]
        weights = [self.checkpoint.tensor(f"{other}.weight").to(self._compute) for other in names]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        counts = [len(part) for part in weights]
        del weights
        moment = self._moments.get(name) if self._moments is not None else None
        joint = encode(weight, fmt, self.quantizer, moment, self._tokens, self._factors).to(_CPU)
        yield from zip(names, joint.split(counts), strict=True)

    def _is_plain(self, name: str) -> bool:
        """Return whether a matrix is a table without a second moment."""
        matrices = self.checkpoint.matrices
        if not matrices.by_name[name].is_table:
            return False
        return self._moments is None or (name == EMBEDDING and not matrices.tied)


def _read(path: Path, place: str, fmt: WeightFormat, N: int, K: int) -> QuantizedMatrix | None:
    """Return the matrix in a cache file, or None if the file is missing or damaged."""
    entry = read_tensors(path)
    if entry is None:
        return None
    tensors, metadata = entry
    try:
        codes, constant = tensors["codes"], float.fromhex(metadata["constant"])
    except (KeyError, ValueError):
        return None
    if metadata.get("place") != place or codes.shape != (N, fmt.padded(K)):
        return None
    return QuantizedMatrix(
        fmt, N, K, codes, tensors.get("scales"), tensors.get("super_scales"), constant, tensors.get("levels")
    )
