"""Error feedback on a GPU: a block of columns at a time, all rows of the matrix side by side.

The arithmetic is that of `coatrt.quantization.gptq` with sums in another order, so that codes differ from the CPU's
where two levels lie equally near but for rounding, and, in that row, in what makes up for such a difference.
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

_BLOCK = 64  # columns coded before the rest of the matrix hears of their errors
_ROWS = 1 << 15  # rows coded together: tables have many, and a kernel's offsets within a block stay below 2^31


def block_codes(
    weight: Tensor, scales: Tensor, block: int, grid: Grid, order: Tensor, factor: Tensor, step: Step | None = None
) -> Tensor:
    """Return codes [N, K] as `coatrt.quantization.gptq.feedback_codes` does, whose arguments these are.

    Args:
        weight: W, float32 [N, K], on any device; all others lie there too.
        scales: float32 [N, blocks].
        block: weights along K that share a scale.
        grid: the levels.
        order: of the inputs.
        factor: of the inverse of the second moment, in that order.
        step: codes the columns of a block, as `torch_step` does; None: the fastest that there is for the device.
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
    """Return the levels [K, n] of a piece of W in the order of the inputs."""
    left = weight.t()[order].contiguous()
    spans = scales.t().contiguous()
    errors = torch.empty(_BLOCK, left.shape[1], device=left.device)
    for start in range(0, len(left), _BLOCK):
        stop = min(start + _BLOCK, len(left))
        made = errors[: stop - start]
        step(left[start:stop], made, factor[start:stop, start:stop].t().contiguous(), places[start:stop], spans, grid)
        left[stop:].addmm_(factor[start:stop, stop:].t(), made, alpha=-1)
    return left


def torch_step(columns: Tensor, errors: Tensor, before: Tensor, places: Tensor, scales: Tensor, grid: Grid) -> None:
    """Code a block of columns one after another, each making up for the errors of those before it.

    Args:
        columns: what is left of Wᵀ, float32 [c, n]; it becomes the levels chosen.
        errors: float32 [c, n], to be filled: what was lost in each column, by its pivot.
        before: Uᵀ of the block, float32 [c, c], lower triangular.
        places: int32 [c], the block of weights each column belongs to.
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
    """Return the kernel of Triton if it can be built and run here, else torch's loop, and say so."""
    try:
        from coatrt.quantization.feedback_kernel import step

        one = torch.ones(1, 1, device="cuda")
        level, error = one * 2.25, one.clone()
        step(level, error, one, torch.zeros(1, dtype=torch.int32, device="cuda"), one, Grid("int8"))
        if (float(level), float(error)) != (2.0, 0.25):
            raise ArithmeticError(f"2.25 is coded as {float(level):g} and {float(error):g}")
    except Exception as error:  # no Triton, no C compiler for it, a GPU it does not know
        warn_once(f"error feedback runs without Triton, forty times as slow or more ({reason(error)})")
        return torch_step
    return step
