"""Error feedback in a block of columns as one Triton kernel: a tile of rows is coded column by column.

Import it on a machine with a CUDA device, or with TRITON_INTERPRET=1; torch for Linux includes Triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from coatrt.quantization.grid import Grid

__all__ = ["step"]

_COLUMNS = 64  # the most of a block, as many as `feedback_blocks.BLOCK`
_TILE = 32  # rows of W per warp; each thread holds all that a block's columns carry in one row, in registers


@triton.jit  # type: ignore[untyped-decorator]
def _code(  # type: ignore[no-untyped-def]
    columns,
    carried,
    before,
    places,
    scales,
    edges,
    levels,
    count,
    rows,
    VALUES: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = row < rows
    past = tl.arange(0, COLUMNS)
    block_carried = tl.zeros((COLUMNS, TILE), tl.float32)
    for j in range(count):
        share = tl.load(before + j * count + past, mask=past < count, other=0.0)
        pivot = tl.load(before + j * count + j)
        column = tl.load(columns + j * rows + row, mask=inside, other=0.0) - tl.sum(block_carried * share[:, None], 0)
        scale = tl.load(scales + tl.load(places + j) * rows + row, mask=inside, other=1.0)
        value = tl.div_rn(column, tl.where(scale == 0.0, 1.0, scale))
        magnitude = tl.abs(value)
        sign = value.to(tl.int32, bitcast=True) & -2147483648
        if KIND == "integer":  # a sum with 1.5 · 2^23 has no fraction bits: it rounds half to even
            most = (1 << (BITS - 1)) * 1.0
            level = (tl.minimum(tl.maximum(value, -most), most - 1.0) + 12582912.0) - 12582912.0
        elif KIND == "fp8":
            least = tl.minimum(magnitude, 448.0)
            bits = least.to(tl.int32, bitcast=True)
            normal = ((bits + 524287 + ((bits >> 20) & 1)) & -1048576).to(tl.float32, bitcast=True)
            subnormal = (least + 24576.0) - 24576.0  # spacing 2^-9
            level = tl.where(least < 0.015625, subnormal, normal)
            level = (level.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        else:
            point = magnitude if KIND == "nvfp4" else value
            below = tl.zeros((TILE,), tl.int32)  # number of edges below the value, by binary search
            for bit in tl.static_range(BITS):
                step = 1 << (BITS - 1 - bit)
                below = tl.where(point > tl.load(edges + below + (step - 1)), below + step, below)
            level = tl.load(levels + below)
            if KIND == "nvfp4":
                level = (level.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        carry = level * scale if VALUES else tl.div_rn(column - level * scale, pivot)
        tl.store(columns + j * rows + row, level, mask=inside)
        tl.store(carried + j * rows + row, carry, mask=inside)
        block_carried = tl.where((past == j)[:, None], carry[None, :], block_carried)


def step(
    columns: Tensor,
    carried: Tensor,
    before: Tensor,
    places: Tensor,
    scales: Tensor,
    grid: Grid,
    values: bool = False,
) -> None:
    """Code a block of columns, see `coatrt.quantization.feedback_blocks.Step`."""
    count, rows = columns.shape
    if grid.levels is None:
        kind, bits, edges, levels = "fp8" if grid.kind == "fp8" else "integer", int(grid.kind[-1]), before, before
    else:
        kind = "nvfp4" if grid.kind == "nvfp4" else "codebook"
        edges, levels = grid.steps(columns.device)
        bits = len(levels).bit_length() - 1
    with torch.cuda.device(columns.device) if columns.is_cuda else torch.no_grad():
        _code[(triton.cdiv(rows, _TILE),)](
            columns,
            carried,
            before,
            places,
            scales,
            edges,
            levels,
            count,
            rows,
            VALUES=values,
            KIND=kind,
            BITS=bits,
            COLUMNS=_COLUMNS,
            TILE=_TILE,
            num_warps=1,
        )
