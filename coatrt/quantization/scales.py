"""Scales: one per block, chosen by the quantization error, and quantized themselves in some formats."""

from collections.abc import Callable

import torch
from torch import Tensor

from coatrt.quantization.grid import E4M3_MAX, Grid
from coatrt.quantization.weight_format import WeightFormat

__all__ = ["RoundScales", "choose_scales", "scale_rounding", "stored_scales", "super_scales", "tensor_scale_of"]

RoundScales = Callable[[Tensor, slice, int], Tensor]
"""(scales [n], their rows, their block) → the nearest ones that the format can store, float32."""

_FP16_MAX = 65504.0
_SUPER_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Clipping candidates as fractions of absmax; fewer bits need stronger clipping.
_RATIOS = {
    2: (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.64, 0.58, 0.52),
    3: (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.74, 0.68),
    4: (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.8, 0.75),
    8: (1.0, 0.97, 0.94, 0.9),
}


def _ratios(kind: str, bits: int) -> tuple[float, ...]:
    """Return the clipping candidates of a kind; with FP8 elements or 256 levels clipping gains nothing."""
    if kind == "nvfp4":
        return (1.0, 0.92, 0.85, 0.75)
    return (1.0,) if kind in ("fp8", "nf8") else _RATIOS[bits]


def tensor_scale_of(weight: Tensor) -> float:
    """Return nvfp4's scale of a matrix, a power of two: exact in fp16, it only shifts the exponents of E4M3."""
    ceiling = float(weight.abs().max()) / Grid("nvfp4").reach / E4M3_MAX
    return float(2.0 ** max(-24, torch.tensor(max(ceiling, 2.0**-24)).log2().ceil().item()))


def choose_scales(
    blocks: Tensor,
    fmt: WeightFormat,
    grid: Grid,
    clip: bool,
    importance: Tensor | None = None,
    tensor_scale: float = 0.0,
) -> Tensor:
    """Return one scale per block, float32, rounded to what the format stores.

    Without `clip` the scale fits the largest magnitude; with it, it is the clipping with the least squared error. With
    an importance h, the energy of each input, it minimises Σ h (w − s·q)²: first over the clippings, with either sign
    for NormalFloat, then the least-squares scale of the resulting codes, Σ h·w·q / Σ h·q². Further iterations gain
    nothing measurable.

    Args:
        blocks: [rows, blocks, B] float32.
        fmt: the effective format.
        grid: its levels.
        clip: whether to try clippings.
        importance: h, [blocks, B]; None: all weights count equally.
        tensor_scale: see `tensor_scale_of`, for nvfp4 only.

    Returns:
        [rows, blocks].
    """
    absmax = blocks.abs().amax(-1)
    # Only a NormalFloat scale may be negative, which mirrors the asymmetric levels. TensorRT refuses a negative
    # scale of DequantizeLinear, and double quantization stores the distance from the least scale.
    signed = importance is not None and fmt.is_normal_float and not fmt.scale_bits
    ratios = _ratios(fmt.kind, fmt.bits) if clip else (1.0,)
    first, *others = (*ratios, *(-ratio for ratio in ratios)) if signed else ratios
    best = _as_stored(absmax * (first / grid.reach), fmt, tensor_scale)
    if not others and importance is None:
        return best
    least = _error(blocks, _levels(blocks, best, grid), best, importance)

    def offer(scale: Tensor) -> None:
        nonlocal best, least
        scale = _as_stored(scale, fmt, tensor_scale)
        error = _error(blocks, _levels(blocks, scale, grid), scale, importance)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)

    for ratio in others:
        offer(absmax * (ratio / grid.reach))
    if importance is not None:
        level = _levels(blocks, best, grid)
        weighted = level * importance
        least_squares = (weighted * blocks).sum(-1) / (weighted * level).sum(-1).clamp(min=1e-30)
        offer(least_squares if signed else least_squares.clamp(min=0))
    return best


def _as_stored(scale: Tensor, fmt: WeightFormat, tensor_scale: float) -> Tensor:
    """Return the scales [rows, blocks] as the format stores them, float32."""
    if fmt.kind != "nvfp4":
        return scale.half().float()
    return (scale / tensor_scale).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float() * tensor_scale


def _levels(blocks: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Return the nearest level [rows, blocks, B] to each weight under the scales [rows, blocks]."""
    return grid.snap(blocks / torch.where(scale != 0, scale, torch.ones_like(scale))[..., None])


def _error(blocks: Tensor, level: Tensor, scale: Tensor, importance: Tensor | None) -> Tensor:
    """Return the squared error [rows, blocks], weighted by importance; `level` is overwritten."""
    squared = level.mul_(scale[..., None]).sub_(blocks).square_()
    return (squared if importance is None else squared.mul_(importance)).sum(-1)


def super_scales(scales: Tensor, fmt: WeightFormat) -> tuple[Tensor, float]:
    """Return (super scales [P], offset) to quantize `scales` [rows, blocks] doubly (arXiv 2509.25214)."""
    offset = float(scales.min().half())
    supers = _flat(scales - offset, fmt).amax(1) / _top(fmt)
    return supers.to(_SUPER_DTYPES[fmt.scale_dtype]), offset


def stored_scales(fmt: WeightFormat, scales: Tensor, constant: float, supers: Tensor | None) -> Tensor:
    """Return scales as the format stores them: float16, E4M3, or codes [P, B1] for double quantization.

    Args:
        fmt: the effective format.
        scales: float32 [rows, blocks].
        constant: nvfp4's tensor scale, or the offset of doubly quantized scales.
        supers: super scales [P], for double quantization only.
    """
    if fmt.kind == "nvfp4":
        return (scales / constant).to(torch.float8_e4m3fn)
    if supers is None:
        return scales.half()
    return _scale_codes(_flat(scales - constant, fmt), supers.float()[:, None], fmt).to(torch.uint8)


def scale_rounding(fmt: WeightFormat, constant: float, supers: Tensor | None, scales: Tensor) -> RoundScales:
    """Return a function that rounds scales to the nearest ones that the format can store beside the others.

    Args:
        fmt: the effective format.
        constant: see `stored_scales`.
        supers: see `stored_scales`; they stay.
        scales: all scales [rows, blocks], for their shape.
    """
    if supers is not None:
        steps = supers.float().repeat_interleave(fmt.scale_block)[: scales.numel()].view(scales.shape)

        def doubly(values: Tensor, rows: slice, block: int) -> Tensor:
            step = steps[rows, block]
            return _scale_codes(values - constant, step, fmt) * step + constant

        return doubly
    least = -_FP16_MAX if fmt.is_normal_float else 0.0  # see `choose_scales`
    return lambda values, rows, block: _as_stored(values.clamp(least, _FP16_MAX), fmt, constant)


def _top(fmt: WeightFormat) -> int:
    return (1 << fmt.scale_bits) - 1


def _flat(scales: Tensor, fmt: WeightFormat) -> Tensor:
    """Return scales [P, B1] row by row, not below zero, padded with zeros."""
    flat = scales.flatten().clamp(min=0)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % fmt.scale_block)).view(-1, fmt.scale_block)


def _scale_codes(above: Tensor, step: Tensor, fmt: WeightFormat) -> Tensor:
    """Return the codes, as floats, of scales above the offset."""
    return (above / torch.where(step > 0, step, torch.ones_like(step))).round_().clamp_(0, _top(fmt))
