"""Quantizers: matrix → codes and scales → matrix, the decoded numbers defined bit for bit.

Encoding has three passes over the rows: choose one scale per block, quantize the scales themselves where the format
does, then give each weight the nearest level under the scale that decoding will really use.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from coatrt.codebooks import codebook
from coatrt.errors import FormatError
from coatrt.formats import WeightFormat

__all__ = ["QUANTIZER_VERSION", "QuantizedMatrix", "ScaleRule", "decode", "decode_scales", "encode", "relative_error"]

QUANTIZER_VERSION = 1  # raise when encode gives other codes: caches are keyed by it
ScaleRule = Literal["mse", "absmax"]

_INT_LIMITS = {"int8": (-128, 127), "int4": (-8, 7)}
_E4M3_MAX = 448.0
_E2M1_MAX = 6.0
_CHUNK = 1 << 20  # weights per piece of work: a few buffers of this size stay in cache
_SUPER_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Clipping candidates as fractions of absmax; fewer bits gain from clipping harder.
_RATIOS = {
    2: (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.64, 0.58, 0.52),
    3: (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.74, 0.68),
    4: (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.8, 0.75),
    8: (1.0, 0.97, 0.94, 0.9),
}


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

    def to(self, device: torch.device) -> "QuantizedMatrix":
        """Return the same matrix with its tensors on `device`."""
        if device == self.codes.device:
            return self
        move = {
            key: tensor.to(device)
            for key in ("codes", "scales", "super_scales")
            if (tensor := getattr(self, key)) is not None
        }
        return replace(self, **move)


def _levels(kind: str) -> Tensor:
    return torch.tensor(codebook(kind))


def _pieces(rows: int, width: int) -> Iterator[slice]:
    step = max(1, _CHUNK // width)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _bucket(values: Tensor, edges: Tensor) -> Tensor:
    """Return as int32 how many of the ascending `edges` lie below each value."""
    if len(edges) > 15:
        return torch.bucketize(values, edges, out_int32=True)
    below = torch.zeros_like(values, dtype=torch.uint8)  # a sum of comparisons is 2-5 times faster than bucketize here
    for edge in edges.tolist():
        below += values > edge
    return below.int()


def _nearest(values: Tensor, kind: str, levels: Tensor | None) -> Tensor:
    """Return the code of the level nearest to each value (already divided by its scale)."""
    if kind in _INT_LIMITS:
        low, high = _INT_LIMITS[kind]
        return values.round().clamp_(low, high)
    if kind == "fp8":
        return values.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    assert levels is not None
    if kind == "nvfp4":
        magnitude = _bucket(values.abs(), (levels[1:8] + levels[:7]) / 2)
        return torch.where((values < 0) & (magnitude > 0), magnitude + 8, magnitude)
    return _bucket(values, (levels[1:] + levels[:-1]) / 2)


def _value(codes: Tensor, levels: Tensor | None) -> Tensor:
    return codes.float() if levels is None else torch.index_select(levels, 0, codes.view(-1)).view(codes.shape)


def _ratios(kind: str, bits: int) -> tuple[float, ...]:
    """Return the clipping candidates of a kind; rounding of FP8 elements and of 256 levels leaves none worth trying."""
    if kind == "nvfp4":
        return (1.0, 0.92, 0.85, 0.75)
    return (1.0,) if kind in ("fp8", "nf8") else _RATIOS[bits]


def _choose_scales(
    blocks: Tensor, kind: str, bits: int, levels: Tensor | None, rule: ScaleRule, tensor_scale: float
) -> Tensor:
    """Return one float32 scale per block of `blocks` [n, B]: the candidate with the least squared error."""
    reach = {"int8": 127.0, "int4": 7.0, "fp8": _E4M3_MAX, "nvfp4": _E2M1_MAX}.get(kind, 1.0)
    absmax = blocks.abs().amax(1)
    ratios = _ratios(kind, bits) if rule == "mse" else (1.0,)
    best_scale, best_error = None, None
    for ratio in ratios:
        scale = absmax * (ratio / reach)
        if kind == "nvfp4":
            scale = (scale / tensor_scale).clamp(max=_E4M3_MAX).to(torch.float8_e4m3fn).float() * tensor_scale
        else:
            scale = scale.half().float()
        if len(ratios) == 1:
            return scale
        safe = torch.where(scale > 0, scale, torch.ones_like(scale))[:, None]
        error = (
            (_value(_nearest(blocks / safe, kind, levels), levels).mul_(scale[:, None]).sub_(blocks)).square_().sum(1)
        )
        if best_scale is None or best_error is None:
            best_scale, best_error = scale, error
        else:
            better = error < best_error
            best_scale = torch.where(better, scale, best_scale)
            best_error = torch.where(better, error, best_error)
    assert best_scale is not None
    return best_scale


def _quantize_scales(scales: Tensor, fmt: WeightFormat) -> tuple[Tensor, Tensor, float]:
    """Return (codes [P, B1], super scales [P], offset) of doubly quantized `scales` (arXiv 2509.25214)."""
    top = (1 << fmt.scale_bits) - 1
    offset = float(scales.min().half())
    flat = (scales.flatten() - offset).clamp_(min=0)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % fmt.scale_block)).view(-1, fmt.scale_block)
    supers = (flat.amax(1) / top).to(_SUPER_DTYPES[fmt.scale_dtype])
    step = supers.float()
    step = torch.where(step > 0, step, torch.ones_like(step))
    return (flat / step[:, None]).round_().clamp_(0, top).to(torch.uint8), supers, offset


def encode(weight: Tensor, weight_format: WeightFormat | str, scales: ScaleRule = "mse") -> QuantizedMatrix:
    """Return `weight` encoded in a format.

    Args:
        weight: [N, K], any floating dtype.
        weight_format: the format asked for; its block is fitted to K by `WeightFormat.effective`.
        scales: "mse" picks per block the clipping with the least squared error; "absmax" takes the largest magnitude
            (the NormalFloat preset of arXiv 2509.25214).

    Raises:
        FormatError: the weight is not a matrix or holds values that are not finite.
    """
    if weight.ndim != 2 or not torch.isfinite(weight).all():
        raise FormatError(f"a weight of shape {tuple(weight.shape)} is no finite matrix; give a finite [N, K] tensor")
    N, K = weight.shape
    fmt = WeightFormat.parse(weight_format).effective(K)
    if not fmt.has_scales:
        dtype = torch.float16 if fmt.kind == "fp16" else torch.bfloat16
        codes = weight.to(dtype)
        if not torch.isfinite(codes).all():
            raise FormatError(f"a weight of magnitude {float(weight.abs().max()):g} overflows fp16; use bf16")
        return QuantizedMatrix(fmt, N, K, codes.clone() if codes is weight else codes)
    width = fmt.padded(K)
    block = fmt.block or width
    levels = _levels(fmt.kind) if fmt.is_normal_float or fmt.kind == "nvfp4" else None

    def rows(piece: slice) -> Tensor:
        part = weight[piece].float()
        return torch.nn.functional.pad(part, (0, width - K)) if width != K else part

    tensor_scale = 0.0
    if fmt.kind == "nvfp4":
        ceiling = float(weight.abs().max()) / _E2M1_MAX / _E4M3_MAX
        # A power of two: exact in fp16 and moves only the exponent of the E4M3 block scales.
        tensor_scale = float(2.0 ** max(-24, torch.tensor(max(ceiling, 2.0**-24)).log2().ceil().item()))
    chosen = torch.empty(N, width // block)
    for piece in _pieces(N, width):
        blocks = rows(piece).reshape(-1, block)
        chosen[piece] = _choose_scales(blocks, fmt.kind, fmt.bits, levels, scales, tensor_scale).view(
            -1, width // block
        )

    stored: Tensor
    supers, constant = None, 0.0
    if fmt.kind == "nvfp4":
        stored, constant = (chosen / tensor_scale).to(torch.float8_e4m3fn), tensor_scale
    elif fmt.scale_bits:
        stored, supers, constant = _quantize_scales(chosen, fmt)
    else:
        stored = chosen.half()
    codes = torch.empty(
        N, width, dtype={"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.int8}.get(fmt.kind, torch.uint8)
    )
    result = QuantizedMatrix(fmt, N, K, codes, stored, supers, constant)
    used = decode_scales(result)
    used = torch.where(used != 0, used, torch.ones_like(used))
    for piece in _pieces(N, width):
        values = rows(piece).view(-1, width // block, block) / used[piece, :, None]
        codes[piece] = _nearest(values, fmt.kind, levels).view(-1, width).to(codes.dtype)
    return result


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

    torch, numpy (`coatrt.numpy_decode`) and the exported graphs give the same bits for float32 and float16.
    """
    fmt = matrix.format
    if matrix.scales is None:
        return matrix.codes.to(dtype)
    if fmt.is_normal_float or fmt.kind == "nvfp4":
        level = torch.index_select(_levels(fmt.kind).to(matrix.codes.device, dtype), 0, matrix.codes.view(-1).int())
    else:
        level = matrix.codes.to(dtype)
    scales = decode_scales(matrix, dtype)
    weight = level.view(matrix.N, scales.shape[1], -1).mul_(scales[:, :, None]).view(matrix.N, -1)
    return weight[:, : matrix.K].contiguous() if weight.shape[1] != matrix.K else weight


def relative_error(weight: Tensor, matrix: QuantizedMatrix) -> float:
    """Return ‖W − Q(W)‖ / ‖W‖ (Frobenius) of a weight [N, K] and its encoded form."""
    reference = weight.float()
    return float((reference - decode(matrix)).norm() / reference.norm().clamp(min=1e-30))
