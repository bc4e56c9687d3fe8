import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatrt.errors import FormatError
from coatrt.quantization.weight_format import KINDS, WeightFormat
from support.formats import PAPER_FORMATS

pytestmark = pytest.mark.fast

PLAIN = [
    WeightFormat(kind, block)
    for kind in KINDS
    for block in {
        "fp16": [0],
        "bf16": [0],
        "int8": [0, 32, 64, 128],
        "int4": [32, 64, 128],
        "fp8": [0],
        "nvfp4": [16],
    }.get(kind, [16, 32, 64])
]
ALL = [*PLAIN, *PAPER_FORMATS]


@pytest.mark.parametrize("weight_format", ALL, ids=str)
def test_text_form_parses_back(weight_format):
    assert WeightFormat.parse(str(weight_format)) == weight_format


def test_the_paper_has_432_formats_from_2_03_to_8_63_bits():
    bits = [f.bits_per_weight() for f in PAPER_FORMATS]
    assert len(set(PAPER_FORMATS)) == 432
    assert (round(min(bits), 2), round(max(bits), 3)) == (2.03, 8.625)


@pytest.mark.parametrize("f", PAPER_FORMATS[::37], ids=str)
def test_bits_equal_the_papers_formula(f):
    b1 = {"bf16": 16, "fp16": 16, "fp32": 32}[f.scale_dtype]
    assert f.bits_per_weight() == f.bits + f.scale_bits / f.block + b1 / (f.block * f.scale_block)


@pytest.mark.parametrize("text, bits", [
    ("fp16", 16), ("bf16", 16), ("int8", 8), ("int8-g64", 8.25), ("int4-g32", 4.5), ("int4-g64", 4.25),
    ("int4-g128", 4.125), ("fp8", 8), ("nvfp4", 4.5), ("nf2-g16", 3), ("nf3-g64", 3.25),
    ("nf3-g64-dq4-bf16-256", 3 + 4 / 64 + 16 / (64 * 256)),
])  # fmt: skip
def test_bits_per_weight(text, bits):
    assert WeightFormat.parse(text).bits_per_weight() == bits


def test_bytes_of_a_matrix_are_counted_to_the_byte():
    # 192 x 576 int8 per channel: one byte a weight and 192 fp16 scales.
    assert WeightFormat.parse("int8").nbytes(192, 576) == 192 * 576 + 192 * 2
    assert WeightFormat.parse("int4-g64").nbytes(192, 576) == 192 * 576 // 2 + 192 * 9 * 2
    # nvfp4: half a byte, one E4M3 byte per 16, one fp32 for the tensor.
    assert WeightFormat.parse("nvfp4").nbytes(192, 576) == 192 * 576 // 2 + 192 * 36 + 4
    # 1728 scales of 4 bits, 7 super scales of bf16, one fp32 offset.
    assert WeightFormat.parse("nf3-g64-dq4-bf16-256").nbytes(192, 576) == 192 * 576 * 3 // 8 + 864 + 14 + 4


def test_a_block_that_does_not_divide_K_is_halved_and_else_padded():
    assert str(WeightFormat.parse("int4-g128").effective(576)) == "int4-g64"
    assert str(WeightFormat.parse("nf4-g64").effective(1536 + 16)) == "nf4-g16"
    same = WeightFormat.parse("int4-g64")
    assert same.effective(100) == same and same.padded(100) == 128
    assert same.nbytes(10, 100) == 10 * 128 // 2 + 10 * 2 * 2


@pytest.mark.parametrize("text", ["", "int4", "int3-g64", "int4-g48", "fp16-g64", "nf5-g64", "INT8",
                                  "nf3-g64-dq5-bf16-256",
                                  "int4-g64-dq4-bf16-256", "nvfp4-g16", "int8-g064", None, 4])  # fmt: skip
def test_unknown_formats_are_refused_with_what_is_allowed(text):
    with pytest.raises(FormatError, match="llowed: fp16, "):
        WeightFormat.parse(text)


@given(st.text(alphabet="abdfginpqv0123456789-", max_size=24))
def test_parse_never_fails_otherwise(text):
    with contextlib.suppress(FormatError):
        assert str(WeightFormat.parse(text)) == text
