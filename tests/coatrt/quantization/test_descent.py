"""Coordinate descent against the textbook: every scale that the format has, every level of every code, in float64."""

import itertools
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import pytest
import torch

from coatrt.quantization.codebooks import codebook
from coatrt.quantization.codec import QuantizedMatrix, decode, decode_scales, encode
from coatrt.quantization.descent import descend
from coatrt.quantization.feedback_blocks import torch_step
from coatrt.quantization.scales import scale_rounding, stored_scales

OWN = (-1.0, -0.5625, -0.25, -0.03125, 0.125, 0.3125, 0.625, 0.875)  # no level is zero
CASES = {  # format → K; 100 has no whole blocks of 16 or 32, a block of 128 is coded in two parts
    "int4-g32": 100,
    "int4-g128": 200,
    "nvfp4": 100,
    "nf2-g32": 96,
    "nf3-g32": 100,
    "nf4-g64": 128,
    "nf3-g32-dq4-bf16-64": 96,
}
E4M3, FLOAT16 = (
    np.unique(values[np.isfinite(values)]).astype(np.float64)
    for values in (
        np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32),
        np.arange(65536, dtype=np.uint16).view(np.float16),
    )
)


def correlated(K, seed=0):
    """Return the second moment of inputs that are correlated and of very unlike energy."""
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(1000, K, generator=generator) @ (torch.randn(K, K, generator=generator) / K**0.5 + torch.eye(K))
    x *= torch.randn(K, generator=generator).exp()
    return x.t() @ x / 1000


@dataclass
class State:
    """A matrix on its way: what `descend` takes, and all scales that its format has."""

    weight: torch.Tensor
    moment: torch.Tensor
    matrix: QuantizedMatrix
    scales: torch.Tensor
    codes: torch.Tensor

    @property
    def block(self):
        return self.matrix.format.block

    @property
    def levels(self):
        """The levels, ascending, float64."""
        fmt, own = self.matrix.format, self.matrix.levels
        if fmt.kind == "int4":
            return np.arange(-8.0, 8.0)
        return np.unique((codebook(fmt.kind) if own is None else own.numpy()).astype(np.float64))

    def choices(self, row, block):
        """Return every scale that the format can store there, ascending, float64."""
        fmt, constant = self.matrix.format, self.matrix.constant
        if fmt.scale_bits:
            place = (row * self.scales.shape[1] + block) // fmt.scale_block
            steps = np.arange(2**fmt.scale_bits, dtype=np.float32)
            step = self.matrix.super_scales[place].float().numpy()
            return np.float64(np.unique(steps * step + np.float32(constant)))
        values = E4M3 * constant if fmt.kind == "nvfp4" else FLOAT16
        return values if fmt.is_normal_float else values[values >= 0]

    def descend(self, step=None):
        rounded = scale_rounding(self.matrix.format, self.matrix.constant, self.matrix.super_scales, self.scales)
        descend(self.weight, self.moment, self.scales, self.codes, self.block, self.matrix.grid, rounded, step)

    @property
    def values(self):
        """Q, float64 [N, K]."""
        spread = self.scales.repeat_interleave(self.block, 1)[:, : self.matrix.K]
        return (self.matrix.grid.value(self.codes) * spread).double().numpy()

    @property
    def error(self):
        return error_of(self.weight.double().numpy(), self.values, self.moment.double().numpy())


def error_of(W, Q, H):
    """Return tr((W − Q) H (W − Q)ᵀ)."""
    return float(((W - Q) @ H * (W - Q)).sum())


def is_one_of(value, ascending):
    """Return whether a number is among others."""
    place = ascending.searchsorted(value)
    return place < len(ascending) and ascending[place] == value


def begin(text, K, N=10, seed=0):
    """Return a matrix after error feedback; nf3 has levels of its own."""
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * 0.02
    moment = correlated(K, seed)
    matrix = encode(weight, text, "feedback", moment)
    if text.startswith("nf3"):
        matrix = replace(matrix, levels=torch.tensor(OWN, dtype=torch.float16))
    return State(weight, moment, matrix, decode_scales(matrix), matrix.codes[:, :K].contiguous())


def begin_anywhere(text, K, N=8, seed=0):
    """Return a matrix with random codes, and random scales of its format."""
    state, rng = begin(text, K, N, seed), np.random.default_rng(seed)
    least, most = (-8, 8) if text.startswith("int4") else (0, 2**state.matrix.format.bits)
    state.codes = torch.from_numpy(rng.integers(least, most, state.codes.shape)).to(state.codes.dtype)
    for row, block in np.ndindex(*state.scales.shape):
        some = state.choices(row, block)
        some = some[np.abs(some) < max(0.1, np.abs(some).min() * 2)]
        state.scales[row, block] = float(rng.choice(some))
    return state


def textbook(state):
    """Return Q after one pass: each scale by search over all scales of the format, each code over all levels."""
    W, H, K = state.weight.double().numpy(), state.moment.double().numpy(), state.matrix.K
    scales, levels = state.scales.double().numpy().copy(), state.levels
    level = state.matrix.grid.value(state.codes).double().numpy()

    def quantized():
        return level * np.repeat(scales, state.block, axis=1)[:, :K]

    for b in range(scales.shape[1]):
        part = range(b * state.block, min((b + 1) * state.block, K))
        for n in range(len(W)):
            own = np.zeros(K)
            own[part] = level[n, part]
            rest = W[n] - quantized()[n] + own * scales[n, b]  # the error with scale zero
            square, product = own @ H @ own, own @ H @ rest
            if square > 0:
                some = state.choices(n, b)
                scales[n, b] = some[(square * some**2 - 2 * product * some).argmin()]
        for j in part:
            Q = quantized()
            change = levels * scales[:, b, None] - Q[:, j, None]
            rise = change**2 * H[j, j] - 2 * change * ((W - Q) @ H[:, j])[:, None]
            level[:, j] = levels[rise.argmin(1)]
    return quantized()


@pytest.mark.parametrize(("text", "K"), CASES.items())
def test_a_pass_is_that_of_the_textbook(text, K):
    state = begin(text, K)
    before, want = state.values, textbook(state)
    other = begin(text, K)
    other.descend(torch_step)
    state.descend()
    for found in (state.values, other.values):
        same = np.isclose(found, want, rtol=1e-5, atol=1e-9).all(1)
        assert same.sum() >= len(same) - 1  # float32 may decide one near tie, and so the rest of a row, otherwise
        W, H = state.weight.double().numpy(), state.moment.double().numpy()
        assert error_of(W, found, H) == pytest.approx(error_of(W, want, H), rel=0.01)
        assert error_of(W, found, H) < 0.98 * error_of(W, before, H)


@pytest.mark.parametrize(("text", "K"), CASES.items())
def test_no_pass_raises_the_error_and_the_format_can_store_every_scale(text, K):
    state = begin_anywhere(text, K)
    errors = [state.error]
    for _ in range(3):
        state.descend()
        errors.append(state.error)
        assert all(is_one_of(s, state.choices(*place)) for place, s in np.ndenumerate(state.scales.numpy()))
    assert errors[1] < 0.6 * errors[0]
    assert all(later <= error * (1 + 1e-5) for error, later in itertools.pairwise(errors))
    matrix = state.matrix
    stored = stored_scales(matrix.format, state.scales, matrix.constant, matrix.super_scales)
    assert torch.equal(decode_scales(replace(matrix, scales=stored)), state.scales)


def test_only_plain_normal_float_takes_a_negative_scale():
    for text, K in CASES.items():
        state = begin(text, K)
        level = state.matrix.grid.value(state.codes)
        spread = state.scales.abs().repeat_interleave(state.block, 1)[:, :K]
        state.weight = -level * spread  # the best scales are those with the sign turned
        state.descend()
        assert (state.scales < 0).any() == (text in ("nf2-g32", "nf3-g32", "nf4-g64")), text


def test_rows_are_coded_alike_in_pieces(monkeypatch):
    whole, pieces = begin("nf3-g32", 96, N=50), begin("nf3-g32", 96, N=50)
    whole.descend()
    monkeypatch.setattr("coatrt.quantization.feedback_blocks._CPU_ROWS", 16)
    pieces.descend()
    assert (whole.codes == pieces.codes).float().mean() > 0.99  # sums may round otherwise
    assert pieces.error == pytest.approx(whole.error, rel=0.01)


def test_codes_of_inputs_that_never_occur_stay():
    for text, K in CASES.items():
        state = begin(text, K)
        dead = torch.arange(K) % 3 == 1
        state.moment[dead], state.moment[:, dead] = 0, 0
        before = state.matrix.grid.value(state.codes)
        state.descend()
        after = state.matrix.grid.value(state.codes)
        assert torch.equal(before[:, dead], after[:, dead]), text
        assert not torch.equal(before, after), text


@pytest.mark.parametrize("text", ["int4-g32", "nvfp4", "nf2-g32", "nf4-g64", "nf3-g32-dq4-bf16-64"])
def test_odd_matrices_stay_finite(text):
    plain, H = torch.randn(6, 72, generator=torch.Generator().manual_seed(5)) * 0.02, correlated(72, 5)
    dead = H.clone()
    dead[:32], dead[:, :32] = 0, 0
    empty_row = plain.clone()
    empty_row[0], empty_row[1, :64] = 0, 0
    huge = (plain * 1e7).clamp(-65504, 65504)
    lone = torch.zeros(4, 72)
    lone[1, 7], lone[2, 71] = 1, -6e4
    for weight, moment in (
        (empty_row, dead),
        (plain[:1], H),
        (plain, torch.zeros(72, 72)),
        (torch.zeros(3, 72), H),
        (huge, H),
        (huge, H * 1e12),
        (plain, H * 1e-12),
        (lone, dead),
        (plain * 1e-6, H),
    ):
        found = encode(weight, text, "refined", moment, 400)
        values = decode(found)
        assert torch.isfinite(values).all() and torch.isfinite(decode_scales(found)).all()
        assert not values[(weight == 0).all(1)].any()
        assert values.abs().max() <= 4 * weight.abs().max() + 1e-9
        if not found.format.is_normal_float or found.format.scale_bits:
            assert (decode_scales(found) >= 0).all()
