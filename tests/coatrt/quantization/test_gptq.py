"""Error feedback against the textbook: one column after another, the inverse Hessian downdated, in float64."""

import ml_dtypes
import numpy as np
import pytest
import torch

from coatrt.errors import FormatError
from coatrt.quantization.codebooks import codebook
from coatrt.quantization.codec import decode, decode_scales, encode
from coatrt.quantization.gptq import DAMPING, InverseFactors, inverse_factor
from coatrt.quantization.grid import Grid
from support.numpy_decode import decode_in_numpy

FORMATS = ("int4-g32", "int8", "int8-g32", "fp8", "nvfp4", "nf2-g32", "nf3-g32", "nf4-g64", "nf3-g32-dq4-bf16-64",
           "nf2-g16-dq2-fp16-16")  # fmt: skip


def weight(N, K, seed=0):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * 0.02


def moment(K, seed=0, tokens=2000):
    """Return E[x xᵀ] of inputs that are correlated and of very unlike energy."""
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(tokens, K, generator=generator) @ (torch.randn(K, K, generator=generator) / K**0.5 + torch.eye(K))
    x = x * torch.randn(K, generator=generator).exp()
    return x.t() @ x / tokens


def output_error(w, encoded, H):
    residual = (decode(encoded) - w).double()
    return float(((residual @ H.double()) * residual).sum())


def grid_values(kind):
    if kind in ("int4", "int8"):
        return np.arange(-8, 8.0) if kind == "int4" else np.arange(-128, 128.0)
    if kind == "fp8":
        values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        return np.unique(values[np.isfinite(values)])
    return np.unique(codebook(kind).astype(np.float64))


def textbook(w, scales, block, H, kind):
    """Return Q(W) by optimal brain surgeon steps: no Cholesky factor, no lazy blocks."""
    w, H, levels = w.astype(np.float64), H.astype(np.float64), grid_values(kind)
    order = np.argsort(-np.diag(H), kind="stable")
    inverse = np.linalg.inv(H[np.ix_(order, order)] + DAMPING * np.diag(H).mean() * np.eye(len(H)))
    left, quantized = w[:, order], np.zeros_like(w)
    for j, column in enumerate(order):
        scale = scales[:, column // block].astype(np.float64)
        candidates = levels[None] * scale[:, None]
        best = candidates[np.arange(len(w)), np.abs(candidates - left[:, j, None]).argmin(1)]
        quantized[:, column] = best
        left -= np.outer((left[:, j] - best) / inverse[j, j], inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, :] = inverse[:, j] = 0
        inverse[j, j] = 1
    return quantized


@pytest.mark.parametrize("K", [192, 100])
@pytest.mark.parametrize("text", FORMATS)
def test_codes_are_those_of_the_textbook(text, K):
    w, H = weight(24, K), moment(K)
    found = encode(w, text, "feedback", H)
    scales = decode_scales(found).numpy()
    want = textbook(w.numpy(), scales, found.format.block or K, H.numpy(), found.format.kind)
    np.testing.assert_allclose(decode(found).numpy(), want, rtol=1e-6, atol=1e-9)
    if found.codes.shape[1] > K:  # paddings stand for zero
        assert not Grid(found.format.kind).value(found.codes[:, K:]).any()


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("seed", range(3))
def test_the_output_error_falls(text, seed):
    w, H = weight(32, 160, seed), moment(160, seed)
    mse, weighted, feedback = (output_error(w, encode(w, text, rule, H), H) for rule in ("mse", "weighted", "feedback"))
    assert feedback < 0.8 * weighted
    assert feedback < 0.8 * mse


@pytest.mark.parametrize("text", FORMATS)
def test_without_correlation_nothing_is_fed_back(text):
    w = weight(20, 100, 3)
    for H in (torch.eye(100), torch.zeros(100, 100)):
        plain, fed = encode(w, text, "weighted", H), encode(w, text, "feedback", H)
        assert torch.equal(decode(plain), decode(fed))
        assert torch.equal(plain.codes.view(torch.uint8), fed.codes.view(torch.uint8))


@pytest.mark.parametrize("text", FORMATS)
def test_few_tokens_shrink_correlations(text):
    w, H = weight(20, 100, 3), moment(100)
    scale = np.where(np.eye(100, dtype=bool), 1.0, 300 / (300 + 100))
    want = textbook(
        w.numpy(),
        decode_scales(encode(w, text, "weighted", H)).numpy(),
        encode(w, text).format.block or 100,
        H.numpy() * scale,
        encode(w, text).format.kind,
    )
    found = encode(w, text, "feedback", H, tokens=300)
    np.testing.assert_allclose(decode(found).numpy(), want, rtol=1e-6, atol=1e-9)
    exact = encode(w, text, "feedback", H)
    assert not torch.equal(decode(exact), decode(found))
    for quantizer, tokens in (("gptq", None), ("gptq", 300)):  # which trusts H whatever it was made from
        assert torch.equal(decode(encode(w, text, quantizer, H, tokens)), decode(exact))


@pytest.mark.parametrize(("tokens", "of_weighted", "of_gptq"), [(80, 0.97, 0.6), (640, 0.8, 0.97)])
@pytest.mark.parametrize("seed", range(3))
def test_feedback_holds_for_other_text(seed, tokens, of_weighted, of_gptq):
    """With half a token for each input GPTQ is far worse than no feedback; ours is better than both, as with four."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(160, 160, generator=generator) / 160**0.5 + torch.eye(160)
    x = torch.randn(tokens, 160, generator=generator) @ mix
    w, truth, few = weight(64, 160, seed), mix.T @ mix, x.T @ x / len(x)
    weighted, gptq, feedback = (
        output_error(w, encode(w, "nf2-g32", rule, few, tokens), truth) for rule in ("weighted", "gptq", "feedback")
    )
    assert feedback < of_weighted * weighted
    assert feedback < of_gptq * gptq


def test_more_columns_than_a_lazy_block_and_fewer_tokens_than_columns():
    w, H = weight(16, 320, 1), moment(320, tokens=50)
    found = encode(w, "nf3-g64", "feedback", H)
    want = textbook(w.numpy(), decode_scales(found).numpy(), 64, H.numpy(), "nf3")
    residual = want - w.numpy()
    expected = ((residual @ H.numpy()) * residual).sum()
    assert output_error(w, found, H) == pytest.approx(expected, rel=0.02)  # float32 may round a few codes otherwise
    assert (decode(found).numpy() == want.astype(np.float32)).mean() > 0.98


@pytest.mark.parametrize("text", FORMATS)
def test_the_decoders_agree(text):
    found = encode(weight(12, 100), text, "feedback", moment(100))
    np.testing.assert_array_equal(decode(found).numpy(), decode_in_numpy(found))


def test_the_factor_is_the_cholesky_factor_of_the_inverse():
    H = moment(40)
    damped = H.double().numpy() + DAMPING * float(H.diagonal().mean()) * np.eye(40)
    want = np.linalg.cholesky(np.linalg.inv(damped)).T
    np.testing.assert_allclose(inverse_factor(H).numpy(), want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def test_damping_rises_until_the_moment_is_definite():
    H = torch.diag(torch.tensor([4.0, 2.0, 1.0, -0.5]))
    factor = inverse_factor(H).double()
    shift = torch.linalg.inv(factor.t() @ factor) - H.double()
    assert float(shift[0, 0]) == pytest.approx(100 * DAMPING * 6.5 / 4, rel=1e-3)
    torch.testing.assert_close(shift, shift[0, 0] * torch.eye(4, dtype=torch.float64), atol=1e-5, rtol=1e-5)


def test_a_factor_serves_every_matrix_of_its_moment_and_no_other(monkeypatch):
    factored = []
    monkeypatch.setattr(
        "coatrt.quantization.gptq.inverse_factor",
        lambda H: factored.append(H.clone()) or inverse_factor(H),
        raising=True,
    )
    H, other, factors = moment(64), moment(64, seed=7), InverseFactors()
    first = encode(weight(8, 64), "nf3-g64", "feedback", H, factors=factors)
    encode(weight(4, 64), "int4-g64", "feedback", H, factors=factors)
    encode(weight(4, 64), "int4-g64", "gptq", H, 100, factors)
    assert len(factored) == 1
    changed = encode(weight(8, 64), "nf3-g64", "feedback", other, factors=factors)
    assert len(factored) == 2 and not torch.equal(changed.codes, first.codes)
    assert torch.equal(encode(weight(8, 64), "nf3-g64", "feedback", H).codes, first.codes)
    encode(weight(8, 64), "nf3-g64", "feedback", other, factors=factors)
    assert len(factored) == 3  # one without factors keeps none and takes none away
    encode(weight(8, 64), "nf3-g64", "feedback", other, 100, factors)
    assert len(factored) == 4


def test_moments_are_checked():
    for bad in (None, torch.eye(5), torch.full((64, 64), float("nan"))):
        for quantizer in ("weighted", "gptq", "feedback", "refined"):
            with pytest.raises(FormatError, match="needs a finite second moment"):
                encode(weight(4, 64), "int4-g64", quantizer, bad)
    with pytest.raises(FormatError, match="not finite"):
        inverse_factor(torch.full((64, 64), float("inf")))
    with pytest.raises(
        FormatError, match="no quantizer 'best'; allowed: absmax, mse, weighted, gptq, feedback, refined"
    ):
        encode(weight(4, 64), "int4-g64", "best")
    assert encode(weight(4, 64), "fp16", "feedback").scales is None  # 16 bits are stored as they are


def test_rows_are_coded_alike_in_pieces(monkeypatch):
    w, H = weight(50, 96), moment(96)
    whole = encode(w, "nf3-g32", "feedback", H)
    monkeypatch.setattr("coatrt.quantization.feedback_blocks._CPU_ROWS", 16)
    assert (encode(w, "nf3-g32", "feedback", H).codes == whole.codes).float().mean() > 0.999  # sums may round otherwise
