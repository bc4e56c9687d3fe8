"""Grids: the nearest level against a search over all of them, and three ways to it that must agree."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coatrt.quantization.grid import Grid

KINDS = ("int8", "int4", "fp8", "nvfp4", "nf2", "nf3", "nf4", "nf8")


def all_levels(kind):
    if kind == "int8":
        return np.arange(-128, 128, dtype=np.float64)
    if kind == "int4":
        return np.arange(-8, 8, dtype=np.float64)
    if kind == "fp8":
        every = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double().numpy()
        return every[np.isfinite(every)]
    return np.float64(Grid(kind).levels.numpy())


def values(kind, seed, count=4000):
    """Return values inside and outside the levels, the levels themselves, and the points half way between them."""
    levels = np.unique(all_levels(kind))
    reach = Grid(kind).reach
    drawn = np.random.default_rng(seed).normal(0, 0.6 * reach, count)
    between = (levels[1:] + levels[:-1]) / 2
    return np.float32(np.concatenate([drawn, levels, between, [0.0, -0.0, 3 * reach, -3 * reach]]))


@pytest.mark.parametrize("kind", KINDS)
def test_no_level_is_nearer(kind):
    x = values(kind, 0)
    grid = Grid(kind)
    found = np.float64(grid.value(grid.nearest(torch.from_numpy(x))).numpy())
    best = np.abs(np.float64(x)[:, None] - all_levels(kind)).min(1)
    np.testing.assert_allclose(np.abs(x - found), best, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999))
def test_snapping_and_rows_equal_code_and_level(kind, seed):
    x, grid = values(kind, seed), Grid(kind)
    codes = grid.nearest(torch.from_numpy(x))
    level = grid.value(codes)
    assert torch.equal(grid.snap(torch.from_numpy(x)), level)
    row_codes, row_levels = grid.row_snapper()(x.copy())
    np.testing.assert_array_equal(row_levels, level.numpy())
    stored = codes.to(grid.dtype).view(torch.uint8).numpy()
    dtype = np.int8 if grid.dtype == torch.int8 else np.uint8
    np.testing.assert_array_equal(row_codes.astype(dtype).view(np.uint8), stored)
