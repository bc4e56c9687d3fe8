"""Matrices that read one input, written as one: their product is one kernel instead of one for each."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from coatrt.models.matrices import fused_name
from coatrt.quantization.codec import QuantizedMatrix

__all__ = ["grouped", "joined"]


def grouped(matrices: Iterable[tuple[str, QuantizedMatrix]]) -> Iterator[dict[str, QuantizedMatrix]]:
    """Yield matrices in network order, those that read one input together; one group is in memory."""
    held: dict[str, QuantizedMatrix] = {}
    last = ""
    for name, matrix in matrices:
        together = fused_name(name)
        if held and (not together or together != last):
            yield held
            held = {}
        held[name], last = matrix, together
        del matrix
    if held:
        yield held


def joined(matrices: Sequence[QuantizedMatrix]) -> QuantizedMatrix | None:
    """Return matrices with a common input as one, None where their codes cannot lie side by side.

    They can where the format is one and what belongs to a whole matrix is equal: the tensor scale of nvfp4. Doubly
    quantized scales run through all rows of a matrix, so they cannot.
    """
    first, *others = matrices
    alike = all((one.format, one.constant) == (first.format, first.constant) for one in others)
    if not others or not alike or first.super_scales is not None:
        return None
    scales = [one.scales for one in matrices if one.scales is not None]
    return replace(
        first,
        N=sum(one.N for one in matrices),
        codes=_below(one.codes for one in matrices),
        scales=_below(scales) if scales else None,
    )


def _below(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return tensors with their rows below each other; 8-bit floats keep their bytes."""
    parts = list(tensors)
    if parts[0].element_size() > 1:
        return torch.cat(parts)
    return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)
