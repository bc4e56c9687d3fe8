"""Grids: the nearest level against a search over all of them, and three ways to it that must agree."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coatrt.quantization.grid import Grid

KINDS = ("int8", "int4", "fp8", "nvfp4", "nf2", "nf3", "nf4", "nf8")
OWN = (  # levels of a matrix's own: uneven, none zero, all of one sign, close together
    Grid("nf2", (-1.0, -0.0625, 0.28125, 0.875)),
    Grid("nf3", (-1.0, -0.5625, -0.25, -0.03125, 0.125, 0.3125, 0.625, 0.875)),
    Grid("nf2", (0.125, 0.25, 0.5, 1.0)),
    Grid("nf2", (-1.0, -0.99951171875, -0.0001220703125, 5.960464477539063e-08)),
)
GRIDS = (*map(Grid, KINDS), *OWN)


def all_levels(grid):
    kind = grid.kind
    if grid.table:
        return np.float64(np.float32(grid.table))
    if kind == "int8":
        return np.arange(-128, 128, dtype=np.float64)
    if kind == "int4":
        return np.arange(-8, 8, dtype=np.float64)
    if kind == "fp8":
        every = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double().numpy()
        return every[np.isfinite(every)]
    return np.float64(Grid(kind).levels.numpy())


def values(grid, seed, count=4000):
    """Return values inside and outside the levels, the levels themselves, and the points half way between them."""
    levels = np.unique(all_levels(grid))
    reach = grid.reach
    drawn = np.random.default_rng(seed).normal(0, 0.6 * reach, count)
    between = (levels[1:] + levels[:-1]) / 2
    return np.float32(np.concatenate([drawn, levels, between, [0.0, -0.0, 3 * reach, -3 * reach]]))


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.kind)
def test_no_level_is_nearer(grid):
    x = values(grid, 0)
    found = np.float64(grid.value(grid.nearest(torch.from_numpy(x))).numpy())
    best = np.abs(np.float64(x)[:, None] - all_levels(grid)).min(1)
    np.testing.assert_allclose(np.abs(x - found), best, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.kind)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999))
def test_snapping_and_rows_equal_code_and_level(grid, seed):
    x = values(grid, seed)
    codes = grid.nearest(torch.from_numpy(x))
    level = grid.value(codes)
    assert torch.equal(grid.snap(torch.from_numpy(x)), level)
    np.testing.assert_array_equal(grid.row_snapper()(x.copy()), level.numpy())
    again = grid.nearest(level).to(grid.dtype)  # codes are stored by way of their levels
    assert torch.equal(again.view(torch.uint8), codes.to(grid.dtype).view(torch.uint8))
