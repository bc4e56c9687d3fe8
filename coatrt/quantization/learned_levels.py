"""Levels of a matrix's own in place of NormalFloat's: a table in the graph costs the same whatever its values."""

import torch
from torch import Tensor

from coatrt.quantization.float32 import full_float32
from coatrt.quantization.grid import Grid

__all__ = ["first_levels", "fit_levels", "sample_rows"]

_ROWS = 256  # rows whose weights decide on the levels
_ELEMENTS = 1 << 25  # of the largest buffer
_ROUNDS = 3  # of Lloyd's iteration: more gain nothing measurable
_RIDGE = 1e-6


def sample_rows(count: int, K: int, levels: int) -> Tensor:
    """Return at most 256 rows of a matrix, evenly spaced, int64; fewer if K is large."""
    return torch.linspace(0, count - 1, min(count, _ROWS, max(16, _ELEMENTS // (levels * K)))).long()


def first_levels(blocks: Tensor, scales: Tensor, importance: Tensor, grid: Grid) -> Grid:
    """Return levels for weights whose errors count by the energy of their input, by Lloyd's iteration.

    Least-squares levels for the codes, least-squares scales, the nearest codes, three times (Lloyd, doi
    10.1109/TIT.1982.1056489). The largest magnitude of a level is 1, as that of NormalFloat.

    Args:
        blocks: some rows of the matrix in blocks, float32 [rows, blocks, B].
        scales: their scales, float32 [rows, blocks].
        importance: energy of each input, [blocks, B].
        grid: the levels to begin with.
    """
    levels = grid.levels
    assert levels is not None
    levels = levels.to(blocks.device)
    for _ in range(_ROUNDS):
        safe = torch.where(scales != 0, scales, torch.ones_like(scales))[..., None]
        codes = torch.bucketize(blocks / safe, (levels[1:] + levels[:-1]) / 2)
        energy = (importance * scales[..., None]).mul_(scales[..., None]).flatten()
        weighted = (importance * scales[..., None]).mul_(blocks).flatten()
        total = torch.zeros_like(levels).index_add_(0, codes.flatten(), energy)
        fitted = torch.zeros_like(levels).index_add_(0, codes.flatten(), weighted) / total.clamp(min=1e-30)
        levels = torch.where(total > 0, fitted, levels)
        value = levels[codes]
        scales = (value * importance * blocks).sum(-1) / (value * value * importance).sum(-1).clamp(min=1e-30)
    return _with_levels(grid, levels / levels.abs().max().clamp(min=1e-30))


def fit_levels(weight: Tensor, moment: Tensor, scales: Tensor, codes: Tensor, block: int, grid: Grid) -> Grid:
    """Return the levels with the least tr((W − Q) H (W − Q)ᵀ) for given codes and scales: a linear system.

    Args:
        weight: some rows of W, float32 [n, K].
        moment: H, float32 [K, K].
        scales: as decoding uses them, float32 [n, blocks].
        codes: their codes, [n, K].
        block: weights along K that share a scale.
        grid: the levels so far, which stay if the system has no ascending solution.
    """
    levels = grid.levels
    assert levels is not None
    spread = scales.repeat_interleave(block, 1)[:, : weight.shape[1]]
    parts = torch.stack([torch.where(codes == code, spread, torch.zeros_like(spread)) for code in range(len(levels))])
    with full_float32():
        products = (parts @ moment).flatten(1)
        system = (products @ parts.flatten(1).T).double()
        right = (products @ weight.flatten()).double()
    system.diagonal().add_(_RIDGE * system.diagonal().mean())
    solution, info = torch.linalg.solve_ex(system, right)
    return grid if info else _with_levels(grid, solution)


def _with_levels(grid: Grid, levels: Tensor) -> Grid:
    """Return a grid with other levels, rounded to float16 so that every decoder has them exactly, if they ascend."""
    rounded = levels.half().float()
    is_valid = bool(torch.isfinite(rounded).all()) and bool((rounded[1:] > rounded[:-1]).all())
    return Grid(grid.kind, tuple(rounded.tolist())) if is_valid else grid
