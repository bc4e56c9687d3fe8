"""Grids: the numbers that the codes of a kind stand for, and which of them is nearest."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from coatrt.codebooks import codebook

__all__ = ["E4M3_MAX", "Grid"]

E4M3_MAX = 448.0
_INT_LIMITS = {"int8": (-128, 127), "int4": (-8, 7)}
_REACH = {"int8": 127.0, "int4": 7.0, "fp8": E4M3_MAX, "nvfp4": 6.0}
_DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.int8}
_FEW = 1 << 14  # below it bucketize costs less than one pass per edge


@dataclass(frozen=True)
class Grid:
    """The levels of one kind of format with scales.

    Args:
        kind: int8, int4, fp8, nvfp4 or nf2/3/4/8.
    """

    kind: str

    @cached_property
    def levels(self) -> Tensor | None:
        """Level by code, float32; None where the code is the level itself."""
        return torch.tensor(codebook(self.kind)) if self.kind == "nvfp4" or self.kind.startswith("nf") else None

    @cached_property
    def _edges(self) -> Tensor:
        """Ascending midpoints of neighbouring levels (nvfp4: of the magnitudes)."""
        assert self.levels is not None
        ascending = self.levels[:8] if self.kind == "nvfp4" else self.levels
        return (ascending[1:] + ascending[:-1]) / 2

    @property
    def dtype(self) -> torch.dtype:
        """What codes are stored in."""
        return _DTYPES.get(self.kind, torch.uint8)

    @property
    def reach(self) -> float:
        """The level that a block's largest magnitude gets without clipping."""
        return _REACH.get(self.kind, 1.0)

    def nearest(self, values: Tensor) -> Tensor:
        """Return the code of the level nearest to each value (already divided by its scale), in a dtype at hand."""
        if self.kind in _INT_LIMITS:
            return values.round().clamp_(*_INT_LIMITS[self.kind])
        if self.kind == "fp8":
            return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        if self.kind == "nvfp4":
            magnitude = _bucket(values.abs(), self._edges)
            return torch.where((values < 0) & (magnitude > 0), magnitude + 8, magnitude)
        return _bucket(values, self._edges)

    def value(self, codes: Tensor) -> Tensor:
        """Return the level of each code, float32."""
        if self.levels is None:
            return codes.float()
        return torch.index_select(self.levels, 0, codes.reshape(-1).int()).view(codes.shape)


def _bucket(values: Tensor, edges: Tensor) -> Tensor:
    """Return as int32 how many of the ascending `edges` lie below each value."""
    if len(edges) > 15 or values.numel() < _FEW:
        return torch.bucketize(values, edges, out_int32=True)
    below = torch.zeros_like(values, dtype=torch.uint8)  # a sum of comparisons is 2-5 times faster than bucketize here
    for edge in edges.tolist():
        below += values > edge
    return below.int()
