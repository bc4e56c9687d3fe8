"""Scales: what "weighted" minimises, against brute force, and what a scale may be."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coatrt.quantization.codebooks import normal_float
from coatrt.quantization.codec import decode, decode_scales, encode

FORMATS = ("int4-g32", "int4-g64", "int8", "int8-g64", "fp8", "nvfp4", "nf2-g32", "nf3-g64", "nf4-g16", "nf8-g32")


def case(N, K, seed):
    generator = torch.Generator().manual_seed(seed)
    energy = torch.randn(K, generator=generator).mul(2).exp()
    return torch.randn(N, K, generator=generator) * 0.02, torch.diag(energy), energy


def block_errors(w, encoded, energy):
    N, K = w.shape
    squared = ((decode(encoded) - w).double() ** 2 * energy.double()).numpy()
    width = encoded.format.padded(K)
    return np.pad(squared, ((0, 0), (0, width - K))).reshape(N, -1, encoded.format.block or width).sum(2)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(1, 9), st.integers(1, 200), st.integers(0, 999))
def test_no_block_is_worse_than_under_mse(text, N, K, seed):
    w, H, energy = case(N, K, seed)
    mse, weighted = (block_errors(w, encode(w, text, rule, H), energy) for rule in ("mse", "weighted"))
    assert (weighted <= mse * (1 + 1e-5) + 1e-12).all()


def test_weighing_helps_where_energies_differ():
    w, H, energy = case(64, 256, 0)
    for text, gain in (("nf2-g64", 0.7), ("nf3-g64", 0.7), ("int4-g64", 0.95), ("nvfp4", 0.95)):
        mse, weighted = (block_errors(w, encode(w, text, rule, H), energy).sum() for rule in ("mse", "weighted"))
        assert weighted < gain * mse, text


def test_two_and_three_bits_come_near_the_best_of_all_scales():
    w, H, energy = case(16, 64, 5)
    for bits in (2, 3):
        levels = normal_float(bits).astype(np.float64)
        found = block_errors(w, encode(w, f"nf{bits}-g64", "weighted", H), energy)[:, 0]
        scales = np.linspace(-3, 3, 6001)[:, None, None] * w.abs().amax(1).double().numpy()[None, :, None]
        best = np.inf
        for part in np.array_split(scales, 60):
            nearest = np.abs(part[..., None] * levels - w.double().numpy()[None, :, :, None]).min(-1)
            best = np.minimum(best, (nearest**2 * energy.double().numpy()).sum(-1).min(0))
        assert (found >= best * (1 - 1e-2)).all()
        assert found.sum() < 1.2 * best.sum(), bits


def test_only_plain_normal_float_scales_may_be_negative():
    # Levels are uneven: these weights fit them with the sign turned.
    levels = torch.tensor(normal_float(2))
    index = torch.randint(0, 4, (8, 64), generator=torch.Generator().manual_seed(1))
    index[:, 0], index[:, 1] = 3, 0
    w = -levels[index] * 0.5
    assert torch.equal(decode(encode(w, "nf2-g64", "weighted", torch.eye(64))), w)
    w, H, _ = case(64, 128, 7)
    assert (decode_scales(encode(w, "nf2-g64", "weighted", H)) < 0).any()
    for text in ("int4-g64", "int8-g64", "int8", "fp8", "nvfp4", "nf2-g64-dq8-fp16-64"):
        assert (decode_scales(encode(w, text, "feedback", H)) >= 0).all(), text


@pytest.mark.parametrize("quantizer", ["weighted", "feedback"])
def test_dead_inputs_and_zero_weights_stay_finite(quantizer):
    w, H, _ = case(8, 64, 2)
    w[0], H[:32] = 0, 0
    for text in FORMATS:
        found = decode(encode(w, text, quantizer, H))
        assert torch.isfinite(found).all()
        assert not found[0].any()
