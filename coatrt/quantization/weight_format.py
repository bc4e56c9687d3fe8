"""Weight formats: how a matrix is stored, as a frozen value with a text form and exact sizes.

fp16 bf16 int8 int8-g64 int4-g64 fp8 nvfp4 nf3-g64 nf3-g64-dq4-bf16-256
kind      -gBLOCK: weights per scale along K      -dqB0-B1-BLOCK1: the scales themselves quantized
"""

import re
from dataclasses import dataclass, replace

from coatrt.errors import FormatError

__all__ = ["BLOCKS", "KINDS", "SCALE_BITS", "SCALE_BLOCKS", "SCALE_DTYPES", "WeightFormat"]

_KINDS: dict[str, tuple[int, tuple[int, ...]]] = {  # bits per element, allowed blocks
    "fp16": (16, (0,)),
    "bf16": (16, (0,)),
    "int8": (8, (0, 32, 64, 128)),
    "int4": (4, (32, 64, 128)),
    "fp8": (8, (0,)),
    "nvfp4": (4, (16,)),
    "nf2": (2, (16, 32, 64)),
    "nf3": (3, (16, 32, 64)),
    "nf4": (4, (16, 32, 64)),
    "nf8": (8, (16, 32, 64)),
}
KINDS = tuple(_KINDS)
BLOCKS = (0, 16, 32, 64, 128)
SCALE_BITS = (0, 2, 3, 4, 8)  # b0 of the paper; 0: scales stay fp16
SCALE_DTYPES = ("", "bf16", "fp16", "fp32")  # b1 of the paper
SCALE_BLOCKS = (0, 16, 64, 256)  # B1 of the paper
_DTYPE_BITS = {"bf16": 16, "fp16": 16, "fp32": 32}
_TEXT = re.compile(r"([a-z]+\d+)(?:-g(\d+))?(?:-dq(\d)-(bf16|fp16|fp32)-(\d+))?")
_ALLOWED = (
    "fp16, bf16, int8, int8-g32/64/128, int4-g32/64/128, fp8, nvfp4, "
    "nf2/3/4/8-g16/32/64[-dq2/3/4/8-bf16/fp16/fp32-16/64/256]"
)


@dataclass(frozen=True, order=True)
class WeightFormat:
    """The storage format of a matrix.

    Args:
        kind: element type, one of `KINDS`.
        block: weights along K that share a scale; 0 for one scale per output channel, or for none (fp16, bf16).
        scale_bits: b0, bits of a quantized scale; 0 keeps fp16 scales (NormalFloat only).
        scale_dtype: b1, dtype of the second-level scale; "" without double quantization.
        scale_block: B1, scales per second-level scale; 0 without double quantization.

    Raises:
        FormatError: the combination does not exist.
    """

    kind: str
    block: int = 0
    scale_bits: int = 0
    scale_dtype: str = ""
    scale_block: int = 0

    def __post_init__(self) -> None:
        double = (self.scale_bits, self.scale_dtype, self.scale_block)
        is_known = self.kind in _KINDS and self.block in _KINDS[self.kind][1]
        is_doubled = (
            self.kind.startswith("nf")
            and self.scale_bits in SCALE_BITS[1:]
            and self.scale_dtype in SCALE_DTYPES[1:]
            and self.scale_block in SCALE_BLOCKS[1:]
        )
        if not is_known or not (double == (0, "", 0) or is_doubled):
            raise FormatError(f"no weight format {self!s}; allowed: {_ALLOWED}")

    @classmethod
    def parse(cls, text: "str | WeightFormat") -> "WeightFormat":
        """Return the format that `text` names, the inverse of `str`; a format is returned unchanged.

        Raises:
            FormatError: no format has this name.
        """
        if isinstance(text, WeightFormat):
            return text
        match = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise FormatError(f"no weight format {text!r}; allowed: {_ALLOWED}")
        kind, block, scale_bits, scale_dtype, scale_block = match.groups()
        default = 16 if kind == "nvfp4" else 0
        parsed = cls(kind, int(block or default), int(scale_bits or 0), scale_dtype or "", int(scale_block or 0))
        if str(parsed) != text:
            raise FormatError(f"no weight format {text!r}; did you mean {parsed!s}? Allowed: {_ALLOWED}")
        return parsed

    def __str__(self) -> str:
        """Return the text form, the inverse of `parse`."""
        text = self.kind + (f"-g{self.block}" if self.block and self.kind != "nvfp4" else "")
        return text + (f"-dq{self.scale_bits}-{self.scale_dtype}-{self.scale_block}" if self.scale_bits else "")

    @property
    def bits(self) -> int:
        """Bits of one stored element, without scales."""
        return _KINDS[self.kind][0]

    @property
    def is_normal_float(self) -> bool:
        """Whether the elements index a NormalFloat codebook."""
        return self.kind.startswith("nf")

    @property
    def has_scales(self) -> bool:
        """Whether the format stores scales (all but fp16 and bf16)."""
        return self.kind not in ("fp16", "bf16")

    def bits_per_weight(self, K: int | None = None) -> float:
        """Return the exact bits per weight including scales, without constants of the whole tensor (≤ 4 bytes).

        b + b0/B0 + bits(b1)/(B0·B1) of arXiv 2509.25214 for double quantization, b + 16/B for fp16 scales,
        4 + 8/16 for nvfp4, b + 16/K for one fp16 scale per output channel. All but 16/K are dyadic, so the float is
        exact.

        Args:
            K: input width, for formats with one scale per output channel; without it that scale counts as zero.
        """
        if not self.has_scales:
            return float(self.bits)
        if self.kind == "nvfp4":
            return 4 + 8 / 16
        if self.scale_bits:
            second_level = _DTYPE_BITS[self.scale_dtype] / (self.block * self.scale_block)
            return self.bits + self.scale_bits / self.block + second_level
        if self.block:
            return self.bits + 16 / self.block
        return self.bits + (16 / K if K else 0.0)

    def effective(self, K: int) -> "WeightFormat":
        """Return the format of a matrix of input width `K`, its block fitted to K.

        The block is halved, down to 16, until it divides K (128 does not divide 576, 64 does). If no such block divides
        K, the format is unchanged and the last block of each row is padded with zeros.
        """
        if not self.block or K % self.block == 0:
            return self
        for block in (self.block // 2, self.block // 4, self.block // 8):
            if block in _KINDS[self.kind][1] and K % block == 0:
                return replace(self, block=block)
        return self

    def padded(self, K: int) -> int:
        """Return K rounded up to a multiple of the block."""
        return -(-K // self.block) * self.block if self.block else K

    def nbytes(self, N: int, K: int) -> int:
        """Return the exact bytes of an N × K matrix: codes, scales, padding and constants of the whole tensor."""
        here = self.effective(K)
        width = here.padded(K)
        if not here.has_scales:
            return N * K * 2
        total = -(-N * width * here.bits // 8)
        scales = N * width // here.block if here.block else N
        if here.kind == "nvfp4":
            return total + scales + 4
        if here.scale_bits:
            supers = -(-scales // here.scale_block)
            return total + -(-scales * here.scale_bits // 8) + supers * _DTYPE_BITS[here.scale_dtype] // 8 + 4
        return total + scales * 2
