"""Levels of a matrix's own: least squares against numpy's, levels that weights have, and what is refused."""

import numpy as np
import pytest
import torch

from coatrt.quantization.codebooks import normal_float
from coatrt.quantization.codec import decode, encode
from coatrt.quantization.grid import Grid
from coatrt.quantization.learned_levels import first_levels, fit_levels, sample_rows

OWN = {
    "nf2": (-1.0, -0.125, 0.4375, 0.875),
    "nf3": (-1.0, -0.5, -0.25, -0.0625, 0.125, 0.3125, 0.625, 0.9375),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def second_moment(K, seed=0):
    x = normal(500, K, seed=seed) @ (normal(K, K, seed=seed + 1) / K**0.5 + torch.eye(K))
    x *= normal(K, seed=seed + 2).exp()
    return x.T @ x / 500


def least_squares(weight, moment, scales, codes, block, count):
    """Return the levels with the least tr((W − Q) H (W − Q)ᵀ): one equation for each row and direction of H."""
    W, S, C = (tensor.double().numpy() for tensor in (weight, scales.repeat_interleave(block, 1), codes))
    root = np.linalg.cholesky(moment.double().numpy())  # H = R Rᵀ
    choices = [S[n, : len(root), None] * (C[n, :, None] == np.arange(count)) for n in range(len(W))]  # [K, levels] each
    equations = np.concatenate([root.T @ choice for choice in choices])
    return np.linalg.lstsq(equations, (W @ root).ravel(), rcond=None)[0]


def own_error(blocks, scales, importance, levels):
    """Return Σ h (w − s q)² under the nearest levels and the least of the scales s·0.5 … s·1.5, block by block."""
    w, h, best = blocks.double().numpy(), importance.double().numpy(), np.inf
    for factor in np.linspace(0.5, 1.5, 51):
        s = scales.double().numpy()[..., None] * factor
        nearest = np.abs(s[..., None] * levels - w[..., None]).min(-1)
        best = np.minimum(best, (h * nearest**2).sum(-1))
    return best.sum()


@pytest.mark.parametrize(("text", "K"), [("nf2-g32", 96), ("nf3-g32", 100), ("nf4-g16", 48)])
def test_fitted_levels_are_those_of_least_squares(text, K):
    weight, H = normal(40, K) * 0.02, second_moment(K)
    matrix = encode(weight, text, "feedback", H)
    codes, scales, grid = matrix.codes[:, :K], matrix.scales.float(), Grid(matrix.format.kind)
    found = fit_levels(weight, H, scales, codes, matrix.format.block, grid)
    want = least_squares(weight, H, scales, codes, matrix.format.block, len(grid.levels))
    assert (np.diff(want) > 0).all()
    np.testing.assert_allclose(found.table, want, rtol=2**-10, atol=1e-4)
    assert found.table != tuple(grid.levels.tolist())
    assert (np.diff(found.table) > 0).all()
    assert torch.equal(torch.tensor(found.table).half().float(), found.levels)


@pytest.mark.parametrize("kind", OWN)
def test_levels_that_the_weights_have_are_recovered(kind):
    levels, rng = torch.tensor(OWN[kind]), np.random.default_rng(3)
    codes = torch.from_numpy(rng.integers(0, len(levels), (24, 96)))
    codes[:, ::32] = 0  # each block has the level −1
    scales = torch.from_numpy(rng.uniform(0.01, 0.1, (24, 3)).astype(np.float16)).float()
    weight = levels[codes] * scales.repeat_interleave(32, 1)
    fitted = fit_levels(weight, second_moment(96), scales, codes, 32, Grid(kind))
    assert fitted.table == OWN[kind]
    blocks, importance = weight.view(24, 3, 32), normal(3, 32).exp()
    found = first_levels(blocks, blocks.abs().amax(-1), importance, Grid(kind))
    assert found.table == OWN[kind]
    whole = encode(weight, f"{kind}-g32", "refined", torch.diag(importance.flatten()))
    np.testing.assert_allclose(decode(whole).numpy(), weight.numpy(), rtol=1e-3, atol=1e-5)


def test_levels_that_do_not_ascend_are_refused():
    weight, H, grid = normal(20, 64) * 0.02, second_moment(64), Grid("nf2", OWN["nf2"])
    matrix = encode(weight, "nf2-g32", "feedback", H)
    scales = matrix.scales.float().abs()
    assert fit_levels(-weight, H, scales, matrix.codes, 32, Grid("nf2")).table == ()
    for case in (
        (weight, H, scales, 3 - matrix.codes),  # codes the other way round
        (weight, H, torch.zeros_like(scales), matrix.codes),  # no equation at all
        (weight, torch.zeros_like(H), scales, matrix.codes),
        (weight, H, scales, torch.full_like(matrix.codes, 2)),  # three levels that no weight has
        (weight * 1e9, H, scales, matrix.codes),  # beyond float16
    ):
        assert fit_levels(*case, 32, grid) is grid


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_first_levels_suit_skewed_weights(bits):
    blocks = normal(32, 4, 32).mul(0.5).exp() * 0.02 - 0.03  # a long tail above
    importance, grid = normal(4, 32, seed=1).mul(2).exp(), Grid(f"nf{bits}")
    scales = blocks.abs().amax(-1)
    found = first_levels(blocks, scales, importance, grid)
    assert max(map(abs, found.table)) == 1
    assert (np.diff(found.table) > 0).all() and len(found.table) == 2**bits
    assert torch.equal(torch.tensor(found.table).half().float(), found.levels)
    plain = own_error(blocks, scales, importance, normal_float(bits).astype(np.float64))
    assert own_error(blocks, scales, importance, np.array(found.table)) < (0.97 if bits == 4 else 0.9) * plain


def test_first_levels_of_nothing_are_those_to_begin_with():
    grid = Grid("nf2")
    for blocks, importance in ((torch.zeros(3, 2, 16), torch.ones(2, 16)), (normal(3, 2, 16), torch.zeros(2, 16))):
        found = first_levels(blocks, blocks.abs().amax(-1), importance, grid)
        np.testing.assert_allclose(found.levels.numpy(), normal_float(2), rtol=2**-11)


def test_rows_that_decide_on_levels_are_spread_and_few():
    assert sample_rows(5, 64, 4).tolist() == [0, 1, 2, 3, 4]
    assert sample_rows(1, 64, 16).tolist() == [0]
    many = sample_rows(100_000, 4096, 4)
    assert len(many) == 256 and many[0] == 0 and many[-1] == 99_999
    assert len(set(many.tolist())) == 256
    wide = sample_rows(4096, 1 << 20, 16)
    assert len(wide) == 16 and wide[-1] == 4095
