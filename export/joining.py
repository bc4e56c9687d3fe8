"""Joins the matrices of a fused group into one, so that a step runs one kernel instead of one per matrix."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from coatrt.models.matrices import fused_name
from coatrt.quantization.codec import QuantizedMatrix

__all__ = ["fused_groups", "join"]


def fused_groups(matrices: Iterable[tuple[str, QuantizedMatrix]]) -> Iterator[dict[str, QuantizedMatrix]]:
    """Yield matrices in network order, one fused group at a time; only that group is in memory."""
    group: dict[str, QuantizedMatrix] = {}
    group_name = ""
    for name, matrix in matrices:
        joint_name = fused_name(name)
        if group and (not joint_name or joint_name != group_name):
            yield group
            group = {}
        group[name], group_name = matrix, joint_name
        del matrix
    if group:
        yield group


def join(matrices: Sequence[QuantizedMatrix]) -> QuantizedMatrix | None:
    """Return the matrices of a fused group as one; None if their codes cannot be concatenated.

    They can if format, levels and per-matrix constant (the tensor scale of nvfp4) are equal. Double quantization cannot
    be joined: its blocks of scales cross the rows of a matrix.
    """
    first, *others = matrices
    equal = all(
        (other.format, other.constant, other.grid) == (first.format, first.constant, first.grid) for other in others
    )
    if not others or not equal or first.super_scales is not None:
        return None
    scales = [matrix.scales for matrix in matrices if matrix.scales is not None]
    return replace(
        first,
        N=sum(matrix.N for matrix in matrices),
        codes=_stack_rows(matrix.codes for matrix in matrices),
        scales=_stack_rows(scales) if scales else None,
    )


def _stack_rows(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return tensors concatenated along their rows; 8-bit floats keep their bytes."""
    parts = list(tensors)
    if parts[0].element_size() > 1:
        return torch.cat(parts)
    return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)
