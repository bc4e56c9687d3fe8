"""Grids: the levels of a kind of format, and the nearest level to a value."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coatrt.quantization.codebooks import codebook

__all__ = ["E4M3_MAX", "Grid"]

Row = NDArray[Any]

E4M3_MAX = 448.0
_INT_LIMITS = {"int8": (-128, 127), "int4": (-8, 7)}
_REACH = {"int8": 127.0, "int4": 7.0, "fp8": E4M3_MAX, "nvfp4": 6.0}
_DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.int8}
_MAX_PASSES = 15  # with more edges a binary search is faster than one pass per edge


@dataclass(frozen=True)
class Grid:
    """The levels of one kind of format with scales.

    Args:
        kind: int8, int4, fp8, nvfp4 or nf2/3/4/8.
        table: a matrix's own levels in place of a NormalFloat codebook, ascending; empty: those of the kind.
    """

    kind: str
    table: tuple[float, ...] = ()

    @cached_property
    def levels(self) -> Tensor | None:
        """Level by code, float32; None if the code is the level."""
        if self.table:
            return torch.tensor(self.table)
        return torch.tensor(codebook(self.kind)) if self.kind == "nvfp4" or self.kind.startswith("nf") else None

    @cached_property
    def _edges(self) -> Tensor:
        """Midpoints between neighbouring levels, ascending (nvfp4: of the magnitudes)."""
        return (self._ascending[1:] + self._ascending[:-1]) / 2

    @cached_property
    def _ascending(self) -> Tensor:
        assert self.levels is not None
        return self.levels[:8] if self.kind == "nvfp4" else self.levels

    def steps(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the ascending edges, and the heights between them, of a codebook (nvfp4: of the magnitudes)."""
        return _steps_on(self, device)

    @cached_property
    def _count(self) -> "_Staircase":
        return _Staircase.of(self._edges, torch.arange(len(self._edges) + 1, dtype=torch.float32))

    @cached_property
    def _round(self) -> "_Staircase":
        return _Staircase.of(self._edges, self._ascending)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of stored codes."""
        return _DTYPES.get(self.kind, torch.uint8)

    @property
    def reach(self) -> float:
        """The level of a block's largest magnitude without clipping."""
        return _REACH.get(self.kind, 1.0)

    def nearest(self, values: Tensor) -> Tensor:
        """Return the code of the level nearest to each value (divided by its scale), in any dtype.

        On a tie in a codebook nvfp4 takes the lower magnitude, the others the lower level.
        """
        if self.kind in _INT_LIMITS:
            return values.round().clamp_(*_INT_LIMITS[self.kind])
        if self.kind == "fp8":
            return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        if self.kind == "nvfp4":
            magnitude = self._edges_below(values.abs())
            return torch.where((values < 0) & (magnitude > 0), magnitude + 8, magnitude)
        return self._edges_below(values)

    def _edges_below(self, values: Tensor) -> Tensor:
        """Return the number of edges below each value, int32."""
        if len(self._edges) > _MAX_PASSES or values.device.type != "cpu":
            return torch.bucketize(values, self.steps(values.device)[0], out_int32=True)
        return self._count(values).int()

    def value(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the level of each code, in `dtype`."""
        if self.levels is None:
            return codes.to(dtype)
        levels = _levels_on(self, codes.device, dtype)
        return torch.index_select(levels, 0, codes.reshape(-1).int()).view(codes.shape)

    def snap(self, values: Tensor) -> Tensor:
        """Return value(nearest(values)), float32; small codebooks skip the codes."""
        if self.levels is None or len(self._edges) > _MAX_PASSES or values.device.type != "cpu":
            return self.value(self.nearest(values))
        return self._round(values.abs()).copysign_(values) if self.kind == "nvfp4" else self._round(values)

    def row_snapper(self) -> Callable[[Row], Row]:
        """Return a function from one row of float32 values to their levels, equal to `snap`.

        For rows of a few thousand values, where the overhead of torch calls dominates. The row is overwritten.
        """
        if self.kind in _INT_LIMITS:
            least, most = map(np.float32, _INT_LIMITS[self.kind])
            return lambda row: np.maximum(np.minimum(np.rint(row, out=row), most, out=row), least, out=row)
        if self.levels is None:
            return lambda row: self.nearest(torch.from_numpy(row)).float().numpy()
        levels, edges = self._ascending.numpy(), self._edges.numpy()
        if self.kind == "nvfp4":
            return lambda row: np.copysign(levels.take(edges.searchsorted(np.abs(row))), row)
        return lambda row: levels.take(edges.searchsorted(row))


@lru_cache(maxsize=4096)
def _steps_on(grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the edges and heights of a codebook on a device, cached."""
    return grid._edges.to(device), grid._ascending.to(device)


@lru_cache(maxsize=4096)
def _levels_on(grid: Grid, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the levels of a codebook on a device, cached."""
    assert grid.levels is not None
    return grid.levels.to(device, dtype)


@dataclass(frozen=True)
class _Staircase:
    """A step function: heights[i], i the number of ascending edges below a value.

    One branch-free pass per edge, several times faster than a binary search. Steps are summed from the height next to
    zero outwards, where magnitudes grow, so that a step to exactly the next height exists.
    """

    start: float
    up: tuple[tuple[float, float], ...]
    down: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, edges: Tensor, heights: Tensor) -> "_Staircase":
        zero, edge, height = int(heights.abs().argmin()), edges.tolist(), list(heights)
        up = tuple((edge[i], _exact_step(height[i], height[i + 1])) for i in range(zero, len(edge)))
        down = tuple((edge[i], _exact_step(height[i + 1], height[i])) for i in reversed(range(zero)))
        return cls(float(heights[zero]), up, down)

    def __call__(self, values: Tensor) -> Tensor:
        result, above = torch.full_like(values, self.start), torch.empty_like(values)
        for edge, step in self.up:
            result.add_(torch.gt(values, edge, out=above), alpha=step)
        for edge, step in self.down:
            result.add_(torch.le(values, edge, out=above), alpha=step)
        return result


def _exact_step(old: Tensor, new: Tensor) -> float:
    """Return the float32 step such that `old` + step rounds to `new`, which is larger in magnitude."""
    step = new - old
    for direction in (-torch.inf, torch.inf):
        other = torch.nextafter(step, torch.tensor(direction))
        if old + step != new and old + other == new:
            step = other
    return float(step)
