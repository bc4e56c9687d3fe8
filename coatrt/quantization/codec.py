"""Quantizers: matrix → codes and scales → matrix, the decoded numbers defined bit for bit.

Encoding has three passes over the rows: choose one scale per block, quantize the scales themselves where the format
does, then give each weight the nearest level under the scale that decoding will really use, or, with error feedback,
the level that best makes up for the errors of the inputs before it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from coatrt.errors import FormatError
from coatrt.quantization.gptq import InverseFactors, feedback_codes
from coatrt.quantization.grid import Grid
from coatrt.quantization.quantizers import CALIBRATED, FED_BACK, QUANTIZERS, Quantizer
from coatrt.quantization.scales import choose_scales, quantize_scales, tensor_scale_of
from coatrt.quantization.weight_format import WeightFormat

__all__ = ["QuantizedMatrix", "decode", "decode_scales", "encode", "relative_error"]

_CHUNK = 1 << 20  # weights per piece of work: a few buffers of this size stay in cache
_CHUNK_BESIDE = 1 << 26  # the same on a GPU: a buffer takes a quarter of a GiB


@dataclass(frozen=True)
class QuantizedMatrix:
    """One encoded matrix in Hugging Face layout [N, K], blocks along K.

    Args:
        format: the effective format (block already fitted to K).
        N: output width.
        K: input width; codes are padded to Kp = `format.padded(K)`.
        codes: [N, Kp]; int8 (int8, int4), uint8 codebook index (nf*, nvfp4), float8_e4m3fn (fp8), or the value itself
            in float16 or bfloat16.
        scales: float16 [N, Kp / block] or [N, 1] per channel; float8_e4m3fn for nvfp4; for double quantization uint8
            codes [P, scale_block], the scales flattened row by row and padded with zeros; None for fp16 and bf16.
        super_scales: [P] in the format's scale_dtype, for double quantization only.
        constant: nvfp4's tensor scale (a power of two), or the offset added to doubly quantized scales; else 0.
    """

    format: WeightFormat
    N: int
    K: int
    codes: Tensor
    scales: Tensor | None = None
    super_scales: Tensor | None = None
    constant: float = 0.0

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those of codes, scales and super scales that it has, by the names of their fields."""
        found = {"codes": self.codes, "scales": self.scales, "super_scales": self.super_scales}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors in memory."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to(self, device: torch.device) -> "QuantizedMatrix":
        """Return the same matrix with its tensors on `device`; on the way to a GPU nothing waits for what it does."""
        moved: dict[str, Any] = {
            name: tensor.to(device, non_blocking=device.type == "cuda") for name, tensor in self.tensors.items()
        }
        return replace(self, **moved)


def encode(
    weight: Tensor,
    weight_format: WeightFormat | str,
    quantizer: Quantizer = "mse",
    moment: Tensor | None = None,
    tokens: int | None = None,
    factors: InverseFactors | None = None,
) -> QuantizedMatrix:
    """Return `weight` encoded in a format.

    Args:
        weight: [N, K], any floating dtype, on the device that is to encode it; the result is there too.
        weight_format: the format asked for; its block is fitted to K by `WeightFormat.effective`.
        quantizer: "mse" picks per block the clipping with the least squared error; "absmax" takes the largest magnitude
            (the NormalFloat preset of arXiv 2509.25214); "weighted" weighs every error with the energy of its input,
            the diagonal of `moment`; "gptq" codes one input after another under those scales, each making up for the
            errors before it (`coatrt.quantization.gptq`); "feedback" does so as far as `tokens` bear out the moment.
        moment: H = E[x xᵀ] of the inputs, [K, K]; needed by "weighted", "gptq" and "feedback", else ignored. It is
            moved to the weight's device, so keep it there where it serves several matrices.
        tokens: how many tokens the moment is the mean of, for "feedback" (`coatrt.quantization.gptq.shrunk`); None: it
            is exact.
        factors: for "gptq" and "feedback": where the factor made from the moment is kept for the next matrix; None: it
            is not kept.

    Raises:
        FormatError: the weight is not a matrix or holds values that are not finite, or the quantizer lacks its moment.
    """
    if weight.ndim != 2 or not torch.isfinite(weight).all():
        raise FormatError(f"a weight of shape {tuple(weight.shape)} is no finite matrix; give a finite [N, K] tensor")
    K = weight.shape[1]
    fmt = WeightFormat.parse(weight_format).effective(K)
    if not fmt.has_scales:
        return _as_stored(weight, fmt)
    _check(quantizer, moment, K)
    if moment is not None:
        moment = moment.to(weight.device)
    grid = Grid(fmt.kind)
    result = _scaled(weight, fmt, grid, quantizer, moment)
    scales = decode_scales(result)
    if quantizer in FED_BACK:
        assert moment is not None
        trusted = tokens if quantizer == "feedback" else None
        order, factor = (factors or InverseFactors()).get(moment.float(), trusted)
        result.codes[:, K:] = grid.nearest(torch.zeros(1, device=weight.device)).to(grid.dtype)
        result.codes[:, :K] = feedback_codes(weight.float(), scales, fmt.block or K, grid, order, factor)
        return result
    safe = torch.where(scales != 0, scales, torch.ones_like(scales))
    for rows, blocks in _pieces(weight, fmt):
        result.codes[rows] = grid.nearest(blocks / safe[rows, :, None]).flatten(1).to(grid.dtype)
    return result


def _as_stored(weight: Tensor, fmt: WeightFormat) -> QuantizedMatrix:
    """Return a weight in float16 or bfloat16."""
    codes = weight.to(torch.float16 if fmt.kind == "fp16" else torch.bfloat16)
    if not torch.isfinite(codes).all():
        raise FormatError(f"a weight of magnitude {float(weight.abs().max()):g} overflows fp16; use bf16")
    N, K = weight.shape
    return QuantizedMatrix(fmt, N, K, codes.clone() if codes is weight else codes)


def _pieces(weight: Tensor, fmt: WeightFormat) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, their blocks [rows, blocks, block], float32, the last one padded with zeros)."""
    N, K = weight.shape
    width = fmt.padded(K)
    step = max(1, (_CHUNK if weight.device.type == "cpu" else _CHUNK_BESIDE) // width)
    for start in range(0, N, step):
        rows = slice(start, min(start + step, N))
        part = torch.nn.functional.pad(weight[rows].float(), (0, width - K)) if width != K else weight[rows].float()
        yield rows, part.view(len(part), -1, fmt.block or width)


def _scaled(
    weight: Tensor, fmt: WeightFormat, grid: Grid, quantizer: Quantizer, moment: Tensor | None
) -> QuantizedMatrix:
    """Return the matrix with its scales chosen and stored, and codes that are still zero."""
    N, K = weight.shape
    width = fmt.padded(K)
    importance = None
    if quantizer in CALIBRATED:
        assert moment is not None
        importance = torch.nn.functional.pad(moment.diagonal().float(), (0, width - K)).view(-1, fmt.block or width)
    constant = tensor_scale_of(weight) if fmt.kind == "nvfp4" else 0.0
    chosen = torch.empty(N, width // (fmt.block or width), device=weight.device)
    for rows, blocks in _pieces(weight, fmt):
        chosen[rows] = choose_scales(blocks, fmt, grid, quantizer != "absmax", importance, constant)
    supers = None
    if fmt.kind == "nvfp4":
        stored = (chosen / constant).to(torch.float8_e4m3fn)
    elif fmt.scale_bits:
        stored, supers, constant = quantize_scales(chosen, fmt)
    else:
        stored = chosen.half()
    codes = torch.zeros(N, width, dtype=grid.dtype, device=weight.device)
    return QuantizedMatrix(fmt, N, K, codes, stored, supers, constant)


def _check(quantizer: Quantizer, moment: Tensor | None, K: int) -> None:
    if quantizer not in QUANTIZERS:
        raise FormatError(f"no quantizer {quantizer!r}; allowed: {', '.join(QUANTIZERS)}")
    if quantizer in CALIBRATED and (moment is None or moment.shape != (K, K) or not torch.isfinite(moment).all()):
        given = "none" if moment is None else f"one of shape {tuple(moment.shape)}"
        raise FormatError(
            f"the quantizer {quantizer} needs a finite second moment [{K}, {K}] of the inputs, {given} is given; "
            "calibrate, or use mse"
        )


def decode_scales(matrix: QuantizedMatrix, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the scales [N, Kp / block] (or [N, 1]) as decoding in `dtype` uses them.

    Every step is one rounded operation in `dtype`: a cast; for nvfp4 E4M3 × tensor scale; for double quantization
    code × second-level scale, then + offset.
    """
    fmt, scales = matrix.format, matrix.scales
    if scales is None:
        raise FormatError(f"{fmt} has no scales; ask only formats with scales")
    if fmt.kind == "nvfp4":
        return scales.to(dtype) * torch.tensor(matrix.constant, dtype=dtype)
    if matrix.super_scales is not None:
        flat = scales.to(dtype) * matrix.super_scales.to(dtype)[:, None] + torch.tensor(matrix.constant, dtype=dtype)
        count = matrix.N * (fmt.padded(matrix.K) // fmt.block)
        return flat.flatten()[:count].view(matrix.N, -1)
    return scales.to(dtype)


def decode(matrix: QuantizedMatrix, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight [N, K] that the codes stand for: level in `dtype` × scale in `dtype`, rounded once.

    torch, numpy (tests/support/numpy_decode.py) and the exported graphs give the same bits for float32 and float16.
    """
    if matrix.scales is None:
        return matrix.codes.to(dtype)
    level, scales = Grid(matrix.format.kind).value(matrix.codes, dtype), decode_scales(matrix, dtype)
    weight = level.view(matrix.N, scales.shape[1], -1).mul_(scales[:, :, None]).view(matrix.N, -1)
    return weight[:, : matrix.K].contiguous() if weight.shape[1] != matrix.K else weight


def relative_error(weight: Tensor, matrix: QuantizedMatrix) -> float:
    """Return ‖W − Q(W)‖ / ‖W‖ (Frobenius) of a weight [N, K] and its encoded form."""
    reference = weight.float()
    return float((reference - decode(matrix)).norm()) / float(reference.norm().clamp(min=1e-30))
