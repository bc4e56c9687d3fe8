"""One matrix as a quantized checkpoint stores it: its values, and the coatrt format that holds its codes."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from coatrt.errors import CheckpointError

__all__ = ["Codes", "PackedMatrix"]

_BLOCKS = (128, 64, 32)  # of int4 and int8, largest first
_ROUNDING = 2.0**-11  # largest relative error of a scale rounded to float16
_LEAST_CONSTANT = 2.0**-14  # the least normal float16: below, nvfp4's factor would lose digits in float16 graphs
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_CHUNK = 1 << 24  # weights decoded at a time


class Codes(NamedTuple):
    """Codes and scales as `coatrt.quantization.codec.QuantizedMatrix` holds them.

    Args:
        format: text of the weight format.
        codes: [N, K].
        scales: [N, blocks].
        constant: factor of all scales, for nvfp4; else 0.
        rounded: whether a scale was rounded to float16.
    """

    format: str
    codes: Tensor
    scales: Tensor
    constant: float
    rounded: bool


@dataclass(frozen=True)
class PackedMatrix:
    """A stored matrix [N, K]: value = level × scale.

    Args:
        levels: int16 (code − zero point), float8_e4m3fn, or uint8, which indexes the values of E2M1.
        scales: float32 [N, groups], for E2M1 without the tensor's scale.
        block: weights along K that share a scale; 0: a row has one.
        bits: of a stored integer code.
        dtype: of the decoded weight.
        order: int64 [K], the group of each column where groups are not consecutive; None: they are.
        factor: E2M1's scale of the tensor.
        divides: whether scales are divided by `factor` (compressed-tensors) instead of multiplied (ModelOpt).
    """

    levels: Tensor
    scales: Tensor
    block: int
    bits: int
    dtype: torch.dtype
    order: Tensor | None = None
    factor: float = 1.0
    divides: bool = False

    @property
    def _width(self) -> int:
        """Weights along K that share a scale, at least 1."""
        K = max(self.levels.shape[1], 1)
        return min(self.block, K) if self.block else K

    def check(self, name: str) -> None:
        """Refuse values that are not finite, and groups that do not fit the matrix.

        Raises:
            CheckpointError: so it is.
        """
        N, K = self.levels.shape
        groups = -(-K // self._width)
        if self.order is not None:
            groups = int(self.order.max()) + 1 if len(self.order) else 0
            if len(self.order) != K or int(self.order.min()) < 0 or groups > self.scales.shape[1]:
                raise CheckpointError(f"{name}: its g_idx names groups that it has no scales for; download it again")
            groups = self.scales.shape[1]
        if self.scales.shape != (N, groups):
            raise CheckpointError(
                f"{name} is [{N}, {K}] in groups of {self._width} and has scales {list(self.scales.shape)}, not "
                f"[{N}, {groups}]; download it again"
            )
        finite = torch.isfinite(self.scales).all() and 0 < abs(self.factor) < float("inf")
        if self.levels.dtype == torch.float8_e4m3fn:
            finite = finite and not ((self.levels.view(torch.uint8) & 0x7F) == 0x7F).any()
        if not finite:
            raise CheckpointError(f"{name} has scales or values that are not finite; download the model again")

    def decode(self) -> Tensor:
        """Return the weight [N, K] in its dtype: level × scale in float32, rounded once, as its loaders do.

        For E2M1 the scale is rounded to float32 once before.
        """
        N, K = self.levels.shape
        groups = self.order if self.order is not None else torch.arange(K) // self._width
        scales = self._scales()
        weight = torch.empty(N, K, dtype=self.dtype)
        step = max(1, _CHUNK // max(K, 1))
        for start in range(0, N, step):
            rows = slice(start, start + step)
            level = self.levels[rows]
            level = _E2M1[level.int()] if level.dtype == torch.uint8 else level.float()
            weight[rows] = level.mul_(scales[rows][:, groups]).to(self.dtype)
        return weight

    def _scales(self) -> Tensor:
        factor = torch.tensor(self.factor, dtype=torch.float32)
        return self.scales / factor if self.divides else self.scales * factor

    def codes(self) -> Codes | str:
        """Return the codes in the smallest coatrt format that holds them, or why none does."""
        if self.order is not None and not torch.equal(self.order, torch.arange(len(self.order)) // self._width):
            return "groups in the order of activations (desc_act)"
        if self.levels.dtype == torch.uint8:
            return self._nvfp4()
        scales = self.scales.half()
        if not bool(((scales.float() - self.scales).abs() <= _ROUNDING * self.scales.abs()).all()):
            return "scales beyond the range of float16"
        rounded = not torch.equal(scales.float(), self.scales)
        if self.levels.dtype == torch.float8_e4m3fn:
            if self.scales.shape[1] != 1:
                return "FP8 with scales per block"
            return Codes("fp8", self.levels, scales, 0.0, rounded)
        return self._integers(scales, rounded)

    def _integers(self, scales: Tensor, rounded: bool) -> Codes | str:
        K = self.levels.shape[1]
        least, most = map(int, self.levels.aminmax()) if self.levels.numel() else (0, 0)
        kinds = ("int4", "int8") if self.bits <= 4 else ("int8",)
        kind = next((k for k in kinds if -(1 << int(k[3:]) - 1) <= least and most < 1 << int(k[3:]) - 1), None)
        if kind is None:
            return f"{self.bits}-bit codes with zero points beyond int8"
        codes = self.levels.to(torch.int8)
        if kind == "int8" and not self.block:
            return Codes("int8", codes, scales, 0.0, rounded)
        block = next((b for b in _BLOCKS if self._width % b == 0 and K % b == 0), None)
        if block is None:
            return f"groups of {self._width} in {K} columns"
        scales = scales.repeat_interleave(self._width // block, 1)[:, : K // block]
        return Codes(f"{kind}-g{block}", codes, scales.contiguous(), 0.0, rounded)

    def _nvfp4(self) -> Codes | str:
        if self.block != 16 or self.levels.shape[1] % 16:
            return f"FP4 with groups of {self.block}"
        constant = 1 / self.factor if self.divides else self.factor
        exact = constant >= 2.0**-24 and torch.tensor(constant).frexp().mantissa == 0.5
        if not (exact or _LEAST_CONSTANT <= constant <= 1):
            return f"a tensor scale of {constant:.3g}, which float16 does not hold"
        stored = self.scales.to(torch.float8_e4m3fn)
        if not torch.equal(stored.float(), self.scales):
            return "FP4 with scales that are not E4M3"
        return Codes("nvfp4", self.levels, stored, constant, False)
