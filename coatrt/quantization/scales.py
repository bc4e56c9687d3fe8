"""Scales: one per block, chosen by the quantization error, and quantized themselves in some formats."""

import torch
from torch import Tensor

from coatrt.quantization.grid import E4M3_MAX, Grid
from coatrt.quantization.weight_format import WeightFormat

__all__ = ["choose_scales", "quantize_scales", "tensor_scale_of"]

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


def quantize_scales(scales: Tensor, fmt: WeightFormat) -> tuple[Tensor, Tensor, float]:
    """Return (codes [P, B1], super scales [P], offset) of doubly quantized `scales` (arXiv 2509.25214)."""
    top = (1 << fmt.scale_bits) - 1
    offset = float(scales.min().half())
    flat = (scales.flatten() - offset).clamp_(min=0)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % fmt.scale_block)).view(-1, fmt.scale_block)
    supers = (flat.amax(1) / top).to(_SUPER_DTYPES[fmt.scale_dtype])
    step = supers.float()
    step = torch.where(step > 0, step, torch.ones_like(step))
    return (flat / step[:, None]).round_().clamp_(0, top).to(torch.uint8), supers, offset
