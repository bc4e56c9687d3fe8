"""Error feedback on a GPU: a block of columns at a time, all rows of the matrix side by side.

It computes the same as `coatrt.quantization.gptq` with sums in another order. Codes differ from the CPU's where
rounding decides between two equally near levels, and then in later codes of that row, which compensate.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from coatrt.errors import reason
from coatrt.quantization.float32 import full_float32
from coatrt.quantization.grid import Grid
from coatrt.system.notices import warn_once

__all__ = ["block_codes", "torch_step"]

Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Grid], None]

_BLOCK = 64  # columns coded before their errors are propagated to the rest of the matrix
_ROWS = 1 << 15  # rows coded together; keeps a kernel's offsets in a block below 2^31 for large tables


def block_codes(
    weight: Tensor, scales: Tensor, block: int, grid: Grid, order: Tensor, factor: Tensor, step: Step | None = None
) -> Tensor:
    """Return codes [N, K], see `coatrt.quantization.gptq.feedback_codes`, which has the same arguments.

    Args:
        weight: W, float32 [N, K], on any device; the other tensors are on the same device.
        scales: float32 [N, blocks].
        block: weights along K that share a scale.
        grid: the levels.
        order: order of the inputs.
        factor: factor of the inverse second moment, in that order.
        step: codes the columns of a block, like `torch_step`; None: the fastest for the device.
    """
    step = step or _step_for(weight.device)
    places = (order // block).int()
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    with full_float32():
        for start in range(0, len(weight), _ROWS):
            part = slice(start, start + _ROWS)
            levels = _levels(weight[part], scales[part], places, grid, order, factor, step)
            codes[part, order] = grid.nearest(levels).to(grid.dtype).view(torch.uint8).t()
    return codes.view(grid.dtype)


def _levels(
    weight: Tensor, scales: Tensor, places: Tensor, grid: Grid, order: Tensor, factor: Tensor, step: Step
) -> Tensor:
    """Return the levels [K, n] of some rows of W in the order of the inputs."""
    remaining = weight.t()[order].contiguous()
    spans = scales.t().contiguous()
    errors = torch.empty(_BLOCK, remaining.shape[1], device=remaining.device)
    for start in range(0, len(remaining), _BLOCK):
        stop = min(start + _BLOCK, len(remaining))
        block_errors = errors[: stop - start]
        step(
            remaining[start:stop],
            block_errors,
            factor[start:stop, start:stop].t().contiguous(),
            places[start:stop],
            spans,
            grid,
        )
        remaining[stop:].addmm_(factor[start:stop, stop:].t(), block_errors, alpha=-1)
    return remaining


def torch_step(columns: Tensor, errors: Tensor, before: Tensor, places: Tensor, scales: Tensor, grid: Grid) -> None:
    """Code the columns of a block one after another, each compensating the errors of those before it.

    Args:
        columns: remaining part of Wᵀ, float32 [c, n]; overwritten with the levels.
        errors: output, float32 [c, n]: error of each column divided by its pivot.
        before: Uᵀ of the block, float32 [c, c], lower triangular.
        places: int32 [c], scale block of each column.
        scales: float32 [blocks, n].
        grid: the levels.
    """
    spans = scales[places.long()]
    divisors = torch.where(spans != 0, spans, torch.ones_like(spans))
    for j in range(len(columns)):
        column = columns[j] - before[j, :j] @ errors[:j] if j else columns[j].clone()
        level = grid.snap(column / divisors[j])
        errors[j] = (column - level * spans[j]) / before[j, j]
        columns[j] = level


def _step_for(device: torch.device) -> Step:
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
