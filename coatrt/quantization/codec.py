"""Quantizers: matrix → codes and scales → matrix, decoded values exact to the bit.

Encoding has three passes over the rows: choose one scale per block; quantize the scales if the format does; give each
weight the nearest level under the scale that decoding uses or, with error feedback, the level that best compensates
the errors of earlier inputs. The quantizer "refined" then improves levels, scales and codes in turn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from coatrt.errors import FormatError
from coatrt.quantization.descent import descend
from coatrt.quantization.gptq import InverseFactors, damped, feedback_codes, shrink
from coatrt.quantization.grid import Grid
from coatrt.quantization.learned_levels import first_levels, fit_levels, sample_rows
from coatrt.quantization.quantizers import CALIBRATED, FEEDBACK, QUANTIZERS, Quantizer
from coatrt.quantization.scales import choose_scales, scale_rounding, stored_scales, super_scales, tensor_scale_of
from coatrt.quantization.weight_format import WeightFormat

__all__ = ["QuantizedMatrix", "decode", "decode_scales", "encode", "relative_error"]

_CHUNK = 1 << 20  # weights per step: a few buffers of this size stay in the CPU cache
_GPU_CHUNK = 1 << 26  # weights per step on a GPU: a float32 buffer takes 256 MiB
_SWEEPS = {2: 3, 3: 2, 4: 1, 8: 0}  # bits → passes of coordinate descent (docs/evidence/quantizers.md)
_OWN_LEVELS = frozenset({2, 3})  # bits of NormalFloat formats with levels of the matrix's own: they do not help at four


@dataclass(frozen=True)
class QuantizedMatrix:
    """One encoded matrix in Hugging Face layout [N, K], blocks along K.

    Args:
        format: the effective format, its block fitted to K.
        N: output width.
        K: input width; codes are padded to Kp = `format.padded(K)`.
        codes: [N, Kp]; int8 (int8, int4), uint8 codebook index (nf*, nvfp4), float8_e4m3fn (fp8), or the value itself
            in float16 or bfloat16.
        scales: float16 [N, Kp / block] or [N, 1] per channel; float8_e4m3fn for nvfp4; for double quantization uint8
            codes [P, scale_block], the scales flattened row by row and padded with zeros; None for fp16 and bf16.
        super_scales: [P] in the format's scale_dtype, for double quantization only.
        constant: nvfp4's tensor scale (a power of two, unless a quantized checkpoint brings its own), or the offset
            added to doubly quantized scales; else 0.
        levels: the matrix's own levels by code, float16 [2^bits], for NormalFloat only; None: those of the kind.
    """

    format: WeightFormat
    N: int
    K: int
    codes: Tensor
    scales: Tensor | None = None
    super_scales: Tensor | None = None
    constant: float = 0.0
    levels: Tensor | None = None

    @cached_property
    def grid(self) -> Grid:
        """The levels."""
        return Grid(self.format.kind, tuple(self.levels.tolist()) if self.levels is not None else ())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Field name → tensor of codes, scales, super scales and levels, those that exist."""
        fields = {
            "codes": self.codes,
            "scales": self.scales,
            "super_scales": self.super_scales,
            "levels": self.levels,
        }
        return {name: tensor for name, tensor in fields.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors in memory."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to(self, device: torch.device) -> "QuantizedMatrix":
        """Return the matrix with its tensors on `device`, copied to a GPU asynchronously; levels stay on the CPU."""
        tensors: dict[str, Any] = {
            name: tensor.to(device, non_blocking=device.type == "cuda")
            for name, tensor in self.tensors.items()
            if name != "levels"  # they are read as numbers, for which a GPU would have to be waited for
        }
        return replace(self, **tensors)

    def split(self, counts: Sequence[int]) -> "list[QuantizedMatrix]":
        """Return the matrix cut into parts of `counts` rows; its scales must not be doubly quantized."""
        parts, start = [], 0
        for count in counts:
            rows = slice(start, start + count)
            scales = self.scales[rows].clone() if self.scales is not None else None
            parts.append(replace(self, N=count, codes=self.codes[rows].clone(), scales=scales))
            start += count
        return parts if len(parts) > 1 else [self]


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
        weight: [N, K], any floating dtype; encoding runs on its device, which the result stays on.
        weight_format: the format; `WeightFormat.effective` fits its block to K.
        quantizer: "mse" picks the clipping with the least squared error per block; "absmax" scales to the largest
            magnitude (the NormalFloat preset of arXiv 2509.25214); "weighted" weights every error by the energy of its
            input, the diagonal of `moment`; "gptq" codes one input after another under those scales, each compensating
            the errors before it (`coatrt.quantization.gptq`); "feedback" is gptq with the moment shrunk for `tokens`;
            "refined" begins with feedback, then improves scales and codes (`coatrt.quantization.descent`) in formats of
            at most four bits; for nf2 and nf3 with levels of the matrix's own (`coatrt.quantization.learned_levels`),
            improved in turn.
        moment: H = E[x xᵀ] of the inputs, [K, K]; "absmax" and "mse" ignore it, the others need it. It is copied to
            the weight's device, so store it there if several matrices use it.
        tokens: number of tokens that the moment averages, for "feedback" and "refined"
            (`coatrt.quantization.gptq.shrink`); None: the moment is exact.
        factors: cache of the moment's factor for the next matrix; None: no cache.

    Raises:
        FormatError: the weight is not a finite matrix, overflows fp16, or the quantizer lacks its moment.
    """
    if weight.ndim != 2 or not torch.isfinite(weight).all():
        raise FormatError(f"weight must be a finite matrix [N, K], got shape {tuple(weight.shape)}")
    K = weight.shape[1]
    fmt = WeightFormat.parse(weight_format).effective(K)
    if not fmt.has_scales:
        return _as_stored(weight, fmt)
    _check(quantizer, moment, K)
    if moment is not None:
        moment = moment.to(weight.device)
    grid, is_refined = Grid(fmt.kind), quantizer == "refined" and bool(_SWEEPS[fmt.bits])
    if is_refined and _has_own_levels(fmt):
        assert moment is not None
        grid = _first_grid(weight, fmt, moment)
    result = _with_scales(weight, fmt, grid, quantizer, moment)
    scales = decode_scales(result)
    if quantizer in FEEDBACK:
        assert moment is not None
        shrink_tokens = None if quantizer == "gptq" else tokens
        order, factor = (factors or InverseFactors()).get(moment.float(), shrink_tokens)
        result.codes[:, K:] = grid.nearest(torch.zeros(1, device=weight.device)).to(grid.dtype)
        result.codes[:, :K] = feedback_codes(weight.float(), scales, fmt.block or K, grid, order, factor)
        if is_refined:
            return _refine(weight.float(), result, damped(shrink(moment.float(), shrink_tokens)), scales)
        return result
    safe = torch.where(scales != 0, scales, torch.ones_like(scales))
    for rows, blocks in _pieces(weight, fmt):
        result.codes[rows] = grid.nearest(blocks / safe[rows, :, None]).flatten(1).to(grid.dtype)
    return result


def _has_own_levels(fmt: WeightFormat) -> bool:
    return fmt.is_normal_float and fmt.bits in _OWN_LEVELS


def _first_grid(weight: Tensor, fmt: WeightFormat, moment: Tensor) -> Grid:
    """Return a matrix's own levels for some of its rows, errors weighted by the energies of the inputs."""
    grid, (N, K) = Grid(fmt.kind), weight.shape
    rows = weight[sample_rows(N, K, 1 << fmt.bits).to(weight.device)].float()
    blocks = torch.nn.functional.pad(rows, (0, fmt.padded(K) - K)).view(len(rows), -1, fmt.block)
    importance = _importance(moment, fmt)
    return first_levels(blocks, choose_scales(blocks, fmt, grid, True, importance), importance, grid)


def _refine(weight: Tensor, matrix: QuantizedMatrix, moment: Tensor, scales: Tensor) -> QuantizedMatrix:
    """Return the matrix after passes of coordinate descent, with its own levels fitted between them.

    Args:
        weight: W, float32 [N, K].
        matrix: its codes after error feedback.
        moment: H, float32 [K, K].
        scales: as decoding uses them, float32 [N, blocks]; they change in place.
    """
    fmt, grid, K = matrix.format, matrix.grid, matrix.K
    codes, rounded = matrix.codes[:, :K].contiguous(), scale_rounding(fmt, matrix.constant, matrix.super_scales, scales)
    rows = sample_rows(matrix.N, K, 1 << fmt.bits).to(weight.device)
    for sweep in range(_SWEEPS[fmt.bits]):
        if sweep and _has_own_levels(fmt):
            grid = fit_levels(weight[rows], moment, scales[rows], codes[rows], fmt.block, grid)
        descend(weight, moment, scales, codes, fmt.block or K, grid, rounded)
    matrix.codes[:, :K] = codes
    stored = stored_scales(fmt, scales, matrix.constant, matrix.super_scales)
    return replace(matrix, scales=stored, levels=_own_levels(grid))


def _own_levels(grid: Grid) -> Tensor | None:
    return torch.tensor(grid.table, dtype=torch.float16) if grid.table else None


def _importance(moment: Tensor, fmt: WeightFormat) -> Tensor:
    """Return the energy of each input in blocks, [blocks, block]."""
    K = len(moment)
    padded = torch.nn.functional.pad(moment.diagonal().float(), (0, fmt.padded(K) - K))
    return padded.view(-1, fmt.block or K)


def _as_stored(weight: Tensor, fmt: WeightFormat) -> QuantizedMatrix:
    """Return a weight in float16 or bfloat16."""
    codes = weight.to(torch.float16 if fmt.kind == "fp16" else torch.bfloat16)
    if not torch.isfinite(codes).all():
        raise FormatError(f"a weight of magnitude {float(weight.abs().max()):g} overflows fp16; use bf16")
    N, K = weight.shape
    return QuantizedMatrix(fmt, N, K, codes.clone() if codes is weight else codes)


def _pieces(weight: Tensor, fmt: WeightFormat) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, their blocks float32 [rows, blocks, block]); the last block is padded with zeros."""
    N, K = weight.shape
    width = fmt.padded(K)
    step = max(1, (_CHUNK if weight.device.type == "cpu" else _GPU_CHUNK) // width)
    for start in range(0, N, step):
        rows = slice(start, min(start + step, N))
        part = torch.nn.functional.pad(weight[rows].float(), (0, width - K)) if width != K else weight[rows].float()
        yield rows, part.view(len(part), -1, fmt.block or width)


def _with_scales(
    weight: Tensor, fmt: WeightFormat, grid: Grid, quantizer: Quantizer, moment: Tensor | None
) -> QuantizedMatrix:
    """Return the matrix with its scales; its codes are zero."""
    N, K = weight.shape
    width = fmt.padded(K)
    importance = None
    if quantizer in CALIBRATED:
        assert moment is not None
        importance = _importance(moment, fmt)
    constant = tensor_scale_of(weight) if fmt.kind == "nvfp4" else 0.0
    scales = torch.empty(N, width // (fmt.block or width), device=weight.device)
    for rows, blocks in _pieces(weight, fmt):
        scales[rows] = choose_scales(blocks, fmt, grid, quantizer != "absmax", importance, constant)
    supers = None
    if fmt.scale_bits:
        supers, constant = super_scales(scales, fmt)
    codes = torch.zeros(N, width, dtype=grid.dtype, device=weight.device)
    stored = stored_scales(fmt, scales, constant, supers)
    return QuantizedMatrix(fmt, N, K, codes, stored, supers, constant, _own_levels(grid))


def _check(quantizer: Quantizer, moment: Tensor | None, K: int) -> None:
    if quantizer not in QUANTIZERS:
        raise FormatError(f"no quantizer {quantizer!r}; allowed: {', '.join(QUANTIZERS)}")
    if quantizer in CALIBRATED and (moment is None or moment.shape != (K, K) or not torch.isfinite(moment).all()):
        shape = "none" if moment is None else f"one of shape {tuple(moment.shape)}"
        raise FormatError(
            f"the quantizer {quantizer} needs a finite second moment [{K}, {K}] of the inputs, got {shape}; "
            "calibrate, or use mse"
        )


def decode_scales(matrix: QuantizedMatrix, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the scales [N, Kp / block] (or [N, 1]) as decoding in `dtype` uses them.

    Every step is one rounded operation in `dtype`: a cast; for nvfp4 E4M3 × tensor scale; for double quantization
    code × second-level scale, then + offset.
    """
    fmt, scales = matrix.format, matrix.scales
    if scales is None:
        raise FormatError(f"{fmt} has no scales; use a format with scales")
    if fmt.kind == "nvfp4":
        return scales.to(dtype) * torch.tensor(matrix.constant, dtype=dtype)
    if matrix.super_scales is not None:
        flat = scales.to(dtype) * matrix.super_scales.to(dtype)[:, None] + torch.tensor(matrix.constant, dtype=dtype)
        count = matrix.N * (fmt.padded(matrix.K) // fmt.block)
        return flat.flatten()[:count].view(matrix.N, -1)
    return scales.to(dtype)


def decode(matrix: QuantizedMatrix, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the decoded weight [N, K]: level in `dtype` × scale in `dtype`, rounded once.

    torch, numpy (tests/support/numpy_decode.py) and the exported graphs give the same bits for float32 and float16.
    """
    if matrix.scales is None:
        return matrix.codes.to(dtype)
    level, scales = matrix.grid.value(matrix.codes, dtype), decode_scales(matrix, dtype)
    weight = level.view(matrix.N, scales.shape[1], -1).mul_(scales[:, :, None]).view(matrix.N, -1)
    return weight[:, : matrix.K].contiguous() if weight.shape[1] != matrix.K else weight


def relative_error(weight: Tensor, matrix: QuantizedMatrix) -> float:
    """Return ‖W − Q(W)‖ / ‖W‖ (Frobenius) of a weight [N, K] and its encoded form."""
    reference = weight.float()
    return float((reference - decode(matrix)).norm()) / float(reference.norm().clamp(min=1e-30))
