"""The quantizer "refined" as a whole: what it gains on the same and on other text, and that its codes decode alike."""

import numpy as np
import pytest
import torch

from coatrt.quantization.codec import QuantizedMatrix, decode, decode_scales, encode
from coatrt.quantization.grid import Grid
from support.feedback_check import output_error
from support.numpy_decode import decode_in_numpy

FEW_BITS = ("int4-g32", "int4-g64", "int4-g128", "nvfp4", "nf2-g32", "nf3-g32", "nf4-g64", "nf3-g32-dq4-bf16-64",
            "nf2-g16-dq2-fp16-16", "nf4-g16-dq8-fp32-256")  # fmt: skip
EIGHT_BITS = ("int8", "int8-g32", "fp8", "nf8-g32", "nf8-g64-dq4-bf16-16")


def case(N, K, seed, tokens=2000):
    """Return a weight, the moment of some tokens, and the moment of all text."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=generator) / K**0.5 + torch.eye(K)
    mix *= torch.randn(K, generator=generator).exp()
    x = torch.randn(tokens, K, generator=generator) @ mix
    return torch.randn(N, K, generator=generator) * 0.02, x.T @ x / tokens, mix.T @ mix


@pytest.mark.parametrize("text", FEW_BITS)
@pytest.mark.parametrize("seed", range(3))
def test_the_output_error_falls(text, seed):
    weight, H, _ = case(16, 128, seed)
    feedback, refined = (output_error(weight, encode(weight, text, rule, H), H) for rule in ("feedback", "refined"))
    assert refined < {"nf2": 0.85, "nf3": 0.95}.get(text[:3], 0.99) * feedback


@pytest.mark.parametrize("text", ["int4-g32", "nvfp4", "nf2-g32", "nf3-g32", "nf4-g64", "nf3-g32-dq4-bf16-64"])
@pytest.mark.parametrize("tokens", [48, 192])
def test_it_holds_for_other_text(text, tokens):
    """With half a token, or two, for each input: what fits few tokens closer is no worse on others."""
    for seed in range(3):
        weight, few, every = case(24, 96, seed, tokens)
        feedback, refined = (
            output_error(weight, encode(weight, text, rule, few, tokens), every) for rule in ("feedback", "refined")
        )
        assert refined < feedback


@pytest.mark.parametrize("text", EIGHT_BITS)
def test_eight_bits_are_those_of_feedback(text):
    weight, H, _ = case(20, 100, 1)
    feedback, refined = (encode(weight, text, rule, H, 300) for rule in ("feedback", "refined"))
    assert refined.levels is None
    assert set(feedback.tensors) == set(refined.tensors)
    for name, tensor in refined.tensors.items():
        assert torch.equal(tensor.view(torch.uint8), feedback.tensors[name].view(torch.uint8))


@pytest.mark.parametrize("K", [128, 100])
@pytest.mark.parametrize("text", FEW_BITS)
def test_numpy_and_torch_decode_to_the_same_bits(text, K):
    weight, H, _ = case(12, K, 2)
    q = encode(weight, text, "refined", H, 400)
    assert (q.levels is not None) == (q.format.kind in ("nf2", "nf3"))
    for dtype, there in ((torch.float32, np.float32), (torch.float16, np.float16)):
        again = np.ascontiguousarray(decode_in_numpy(q, there))
        assert decode(q, dtype).numpy().tobytes() == again.tobytes()


def test_levels_are_the_matrixs_own_and_exact_in_float16():
    for text in ("nf2-g32", "nf3-g32", "nf3-g64", "nf2-g16-dq2-fp16-16"):
        weight, H, _ = case(32, 128, 3)
        q = encode(weight.exp(), text, "refined", H)
        assert q.levels.dtype == torch.float16 and len(q.levels) == 2**q.format.bits
        assert (q.levels[1:] > q.levels[:-1]).all()
        assert q.grid == Grid(q.format.kind, tuple(q.levels.tolist())) != Grid(q.format.kind)
        assert "levels" in q.tensors and q.nbytes == sum(tensor.nbytes for tensor in q.tensors.values())


def test_parts_of_a_matrix_decode_to_its_rows():
    weight, H, _ = case(30, 96, 4)
    for text in ("nf3-g32", "int4-g32", "nvfp4", "int8", "fp8"):
        whole = encode(weight, text, "refined", H)
        parts = whole.split([20, 4, 6])
        assert [part.N for part in parts] == [20, 4, 6]
        assert all(part.constant == whole.constant and part.grid == whole.grid for part in parts)
        assert torch.equal(torch.cat([decode(part) for part in parts]), decode(whole))
    assert whole.split([30]) == [whole]


def test_scales_without_double_quantization_are_float16_and_those_of_nvfp4_e4m3():
    weight, H, _ = case(16, 128, 5)
    for text, dtype in (("nf3-g32", torch.float16), ("int4-g32", torch.float16), ("nvfp4", torch.float8_e4m3fn)):
        q: QuantizedMatrix = encode(weight, text, "refined", H)
        assert q.scales.dtype == dtype and q.scales.shape == (16, 128 // q.format.block)
        assert torch.isfinite(decode_scales(q)).all()
