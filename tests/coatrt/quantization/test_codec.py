import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coatrt.errors import FormatError
from coatrt.quantization.codebooks import E2M1, normal_float
from coatrt.quantization.codec import QuantizedMatrix, decode, encode, relative_error
from coatrt.quantization.weight_format import WeightFormat
from support.numpy_decode import decode_in_numpy

# Table of QLoRA (arXiv 2305.14314, appendix E).
QLORA_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
FORMATS = ["fp16", "bf16", "int8", "int8-g64", "int4-g32", "int4-g64", "int4-g128", "fp8", "nvfp4", "nf2-g64",
           "nf3-g32",
           "nf4-g64", "nf8-g16", "nf2-g16-dq2-fp16-16", "nf3-g64-dq4-bf16-256", "nf4-g32-dq8-fp32-64",
           "nf8-g64-dq3-bf16-16"]  # fmt: skip


def weight(N=48, K=192, seed=0, scale=0.02):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * scale


def test_nf4_levels_equal_the_published_table():
    assert (
        np.abs(normal_float(4) - np.array(QLORA_NF4)).max() <= 4e-6
    )  # the published table is rounded like this itself
    assert normal_float(4)[7] == 0 and normal_float(4)[0] == -1 and normal_float(4)[15] == 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_normal_float_has_ascending_levels_with_one_zero(bits):
    levels = normal_float(bits)
    assert len(levels) == 2**bits and (np.diff(levels) > 0).all() and (levels == 0).sum() == 1


@pytest.mark.parametrize("K", [192, 100, 144])
@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_numpy_and_torch_decode_to_the_same_bits(text, dtype, K):
    q = encode(weight(K=K), text)
    ours, again = decode(q, dtype), decode_in_numpy(q, np.float32 if dtype == torch.float32 else np.float16)
    assert again.shape == (48, K)
    assert ours.numpy().tobytes() == np.ascontiguousarray(again).tobytes()


@pytest.mark.parametrize("text", FORMATS)
def test_every_weight_gets_the_nearest_level_under_its_scale(text):
    if text in ("fp16", "bf16"):
        pytest.skip("no levels")
    w, fmt = weight(N=8, K=128), WeightFormat.parse(text)
    q = encode(w, fmt)
    scale = (
        decode(QuantizedMatrix(q.format, q.N, q.K, torch.ones_like(q.codes), q.scales, q.super_scales, q.constant))
        if text.startswith(("int", "fp8"))
        else None
    )
    if scale is not None:  # code 1 decodes to the scale itself
        low, high = {"int8": (-128, 127), "int4": (-8, 7)}.get(fmt.kind, (None, None))
        if low is None:
            levels = np.unique(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32))
            levels = levels[np.isfinite(levels)]
        else:
            levels = np.arange(low, high + 1, dtype=np.float32)
        scales = scale.numpy()
    else:
        levels = np.unique(E2M1) if fmt.kind == "nvfp4" else normal_float(fmt.bits)
        top = 7 if fmt.kind == "nvfp4" else 2**fmt.bits - 1
        ones = decode(
            QuantizedMatrix(q.format, q.N, q.K, torch.full_like(q.codes, top), q.scales, q.super_scales, q.constant)
        )
        scales = ones.numpy() / (6.0 if fmt.kind == "nvfp4" else 1.0)
    best = np.abs(levels[None, None] * scales[:, :, None].astype(np.float64) - w.numpy()[:, :, None]).min(2)
    got = np.abs(decode(q).numpy().astype(np.float64) - w.numpy())
    assert (got <= best * (1 + 1e-5) + 1e-6 * np.abs(scales)).all()  # float32 ties between close levels


@pytest.mark.parametrize("text", ["int4-g64", "int8", "nf2-g64", "nf3-g64", "nf4-g64", "nvfp4"])
def test_mse_scales_are_never_worse_than_absmax_and_help_at_few_bits(text):
    w = weight(N=64, K=256)
    mse, absmax = (relative_error(w, encode(w, text, rule)) for rule in ("mse", "absmax"))
    assert mse <= absmax
    if text in ("int4-g64", "nf2-g64"):
        assert mse < 0.95 * absmax


def test_absmax_normal_float_scale_is_the_largest_magnitude():
    w = weight(N=4, K=128)
    q = encode(w, "nf4-g64", "absmax")
    assert torch.equal(q.scales, w.abs().view(4, 2, 64).amax(2).half())


def test_representable_weights_survive_exactly():
    codes = torch.randint(-7, 8, (16, 128), generator=torch.Generator().manual_seed(1)).float()
    codes[:, ::64] = 7  # each block reaches its limit, so the scale found is the true one
    w = codes * 0.0078125
    assert torch.equal(decode(encode(w, "int4-g64")), w)
    levels = torch.tensor(normal_float(3))
    index = torch.randint(0, 8, (16, 128), generator=torch.Generator().manual_seed(2))
    index[:, ::64] = 7
    assert torch.equal(decode(encode(levels[index] * 0.5, "nf3-g64")), levels[index] * 0.5)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(1, 9), st.integers(1, 150), st.floats(1e-4, 10), st.integers(0, 99))
def test_encode_then_decode_keeps_shape_and_bounds_error(text, N, K, scale, seed):
    w = weight(N, K, seed, scale)
    q = encode(w, text)
    d = decode(q)
    assert d.shape == w.shape and torch.isfinite(d).all()
    # Clipping never loses more than the weight itself, and every encoder beats the all-zero one.
    assert (d - w).norm() <= w.norm() * (1.0 if q.format.bits <= 2 or q.format.scale_bits in (2, 3) else 0.5) + 1e-6


def test_zero_matrices_stay_zero():
    for text in FORMATS:
        assert not decode(encode(torch.zeros(4, 64), text)).any(), text


@pytest.mark.parametrize(
    "bad", [torch.tensor([[float("nan"), 1.0]]), torch.tensor([[float("inf"), 1.0]]), torch.zeros(3)]
)
def test_no_finite_matrix_is_refused(bad):
    with pytest.raises(FormatError, match="finite"):
        encode(bad, "int8")


def test_fp16_overflow_is_refused_and_bf16_named():
    with pytest.raises(FormatError, match="bf16"):
        encode(torch.full((1, 16), 1e6), "fp16")
