"""Scales that training has learned in place of those that the quantizer chose."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from coatrt.errors import CheckpointError
from coatrt.quantization.codec import QuantizedMatrix
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.tensors import read_tensors, write_tensors

__all__ = ["LearnedScales"]

_SEPARATOR = " "  # between matrix and format in a file


@dataclass(frozen=True, eq=False)
class LearnedScales:
    """Scales of some matrices in some formats.

    Args:
        tensors: (matrix, format text) → scales, float16 [N, blocks].
    """

    tensors: Mapping[tuple[str, str], Tensor] = field(default_factory=dict)

    @staticmethod
    def can_learn(fmt: WeightFormat) -> bool:
        """Return whether the scales of a format can be learned: float16 scales of at most four bits per code.

        A step of nvfp4's E4M3 scales, 6 to 12 %, is larger than what training changes.
        """
        return bool(fmt.block) and fmt.bits <= 4 and not fmt.scale_bits and fmt.kind != "nvfp4"

    def apply(self, name: str, matrix: QuantizedMatrix) -> QuantizedMatrix:
        """Return a matrix with its learned scales, or as it is if there are none.

        Raises:
            CheckpointError: they are of another shape.
        """
        scales = self.tensors.get((name, str(matrix.format)))
        if scales is None:
            return matrix
        assert matrix.scales is not None
        if scales.shape != matrix.scales.shape:
            raise CheckpointError(
                f"the learned scales of {name} in {matrix.format} have the shape {tuple(scales.shape)}, "
                f"{tuple(matrix.scales.shape)} is needed; copy the adapter again"
            )
        return replace(matrix, scales=scales)

    def save(self, path: Path) -> None:
        """Write the scales as safetensors, atomically."""
        write_tensors(path, {_SEPARATOR.join(key): tensor for key, tensor in self.tensors.items()})

    @classmethod
    def load(cls, path: Path) -> "LearnedScales":
        """Read the scales from a file of `save`.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        content = read_tensors(path)
        if content is None:
            raise CheckpointError(f"{path} is missing or damaged; copy it again")
        tensors = {}
        for key, tensor in content[0].items():
            name, _, fmt = key.partition(_SEPARATOR)
            if tensor.dtype != torch.float16 or tensor.ndim != 2 or not torch.isfinite(tensor).all():
                raise CheckpointError(f"{path} has no finite float16 scales of {name}; copy it again")
            tensors[name, fmt] = tensor
        return cls(tensors)
