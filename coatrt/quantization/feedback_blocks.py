"""Columns coded one after another in blocks, all rows of the matrix side by side, on the CPU or a GPU.

A column's codes depend on what the columns before it in the block carry: their errors in GPTQ
(`coatrt.quantization.gptq`), their values in coordinate descent (`coatrt.quantization.descent`). What the rest of the
matrix needs from a block is one product at its end. A GPU computes the same as a CPU with sums in another order. Codes
differ where rounding decides between two equally near levels, and then in later codes of that row, which compensate.
"""

from collections.abc import Iterator
from functools import cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from coatrt.errors import reason
from coatrt.quantization.grid import Grid
from coatrt.system.notices import warn_once

__all__ = ["BLOCK", "Step", "row_parts", "step_for", "torch_step"]

BLOCK = 64
"""Columns coded before what they carry reaches the rest of the matrix."""

_CPU_ROWS = 4096  # their errors stay in the CPU cache
_GPU_ROWS = 1 << 15  # keeps a kernel's offsets in a block below 2^31 for large tables


class Step(Protocol):
    """Codes the columns of a block one after another."""

    def __call__(
        self,
        columns: Tensor,
        carried: Tensor,
        before: Tensor,
        places: Tensor,
        scales: Tensor,
        grid: Grid,
        values: bool = False,
    ) -> None:
        """Code a block of columns; tensors are contiguous.

        Column j less `before[j, :j]` times what the columns before it carry is divided by its scale and takes the
        nearest level. It carries its error divided by `before[j, j]`, or its value, level × scale.

        Args:
            columns: a block of Wᵀ, float32 [c, n], c at most `BLOCK`; overwritten with the levels.
            carried: output, float32 [c, n].
            before: float32 [c, c], lower triangular.
            places: int32 [c], scale block of each column.
            scales: float32 [blocks, n].
            grid: the levels.
            values: whether columns carry values.
        """


def row_parts(weight: Tensor) -> Iterator[slice]:
    """Yield the rows of W to code together."""
    count = _CPU_ROWS if weight.device.type == "cpu" else _GPU_ROWS
    for start in range(0, len(weight), count):
        yield slice(start, min(start + count, len(weight)))


def torch_step(
    columns: Tensor,
    carried: Tensor,
    before: Tensor,
    places: Tensor,
    scales: Tensor,
    grid: Grid,
    values: bool = False,
) -> None:
    """Code a block of columns, see `Step`, on any device."""
    spans = scales[places.long()]
    divisors = torch.where(spans != 0, spans, torch.ones_like(spans))
    for j in range(len(columns)):
        column = columns[j] - before[j, :j] @ carried[:j] if j else columns[j].clone()
        level = grid.snap(column / divisors[j])
        carried[j] = level * spans[j] if values else (column - level * spans[j]) / before[j, j]
        columns[j] = level


def _numpy_step(
    columns: Tensor,
    carried: Tensor,
    before: Tensor,
    places: Tensor,
    scales: Tensor,
    grid: Grid,
    values: bool = False,
) -> None:
    """Code a block of columns, see `Step`: a step on a few hundred numbers costs torch ten times more than numpy."""
    rows, out, shares, spans = columns.numpy(), carried.numpy(), before.numpy(), scales.numpy()
    divisors = np.where(spans != 0, spans, np.float32(1))
    snap = grid.row_snapper()
    for j, place in enumerate(places.tolist()):
        column = rows[j]
        if j:
            column -= shares[j, :j] @ out[:j]
        level = snap(column / divisors[place])
        np.multiply(level, spans[place], out=out[j])
        if not values:
            np.subtract(column, out[j], out=out[j])
            out[j] /= shares[j, j]
        rows[j] = level


def step_for(device: torch.device) -> Step:
    """Return the fastest step on a device."""
    if device.type == "cpu":
        return _numpy_step
    return _kernel_step() if device.type == "cuda" else torch_step


@cache
def _kernel_step() -> Step:
    """Return the Triton kernel if it builds and runs here; else warn and return torch's loop."""
    try:
        from coatrt.quantization.feedback_kernel import step

        one = torch.ones(1, 1, device="cuda")
        level, error = one * 2.25, one.clone()
        step(level, error, one, torch.zeros(1, dtype=torch.int32, device="cuda"), one, Grid("int8"))
        if (float(level), float(error)) != (2.0, 0.25):
            raise ArithmeticError(f"the kernel codes 2.25 as {float(level):g} with error {float(error):g}")
    except Exception as error:  # no Triton, no C compiler for it, or an unsupported GPU
        warn_once(f"error feedback runs without Triton, at least 40 times slower ({reason(error)}); install triton")
        return torch_step
    return step
