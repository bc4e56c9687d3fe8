"""Coordinate descent: scales and codes chosen again, one at a time, for the least error of the outputs.

GPTQ decides each code once, before those of later inputs are known. Here every scale, and then every code of its block,
takes its best value given all others: QuantEase (arXiv 2309.01885), with scales. tr((W − Q) H (W − Q)ᵀ) never rises.
"""

import torch
from torch import Tensor

from coatrt.quantization.feedback_blocks import BLOCK, Step, row_parts, step_for
from coatrt.quantization.float32 import full_float32
from coatrt.quantization.grid import Grid
from coatrt.quantization.scales import RoundScales

__all__ = ["descend"]

_TINY = 1e-30  # energy of an input that never occurs: its codes stay


def descend(
    weight: Tensor,
    moment: Tensor,
    scales: Tensor,
    codes: Tensor,
    block: int,
    grid: Grid,
    round_scales: RoundScales,
    step: Step | None = None,
) -> None:
    """Pass once over all blocks: their least-squares scales, then their codes; `scales` and `codes` change in place.

    Args:
        weight: W, float32 [N, K], on any device; the other tensors are on the same device.
        moment: H = E[x xᵀ], float32 [K, K].
        scales: as decoding uses them, float32 [N, blocks].
        codes: in the grid's dtype, [N, K].
        block: weights along K that share a scale.
        grid: the levels.
        round_scales: rounds scales to those of the format.
        step: codes the columns of a block; None: the fastest for the device.
    """
    step = step or step_for(weight.device)
    with full_float32():
        for part in row_parts(weight):
            levels = grid.value(codes[part]).t().contiguous()  # [K, n], here and below: columns of W are contiguous
            left = torch.addcmul(
                weight[part].t(), levels, scales[part].t().repeat_interleave(block, 0)[: len(levels)], value=-1
            ).contiguous()
            for b, start in enumerate(range(0, len(levels), block)):
                stop = min(start + block, len(levels))
                scale = scales[part, b]
                change = _best_scale(left, moment, levels[start:stop], scale, start)
                scale = round_scales(scale + change, part, b)
                left[start:stop].addcmul_(levels[start:stop], scale - scales[part, b], value=-1)
                scales[part, b] = scale
                for first in range(start, stop, BLOCK):
                    _code(left, moment, levels, scale.contiguous(), slice(first, min(first + BLOCK, stop)), grid, step)
            codes[part] = grid.nearest(levels).to(grid.dtype).t()


def _best_scale(left: Tensor, moment: Tensor, levels: Tensor, scale: Tensor, start: int) -> Tensor:
    """Return the change [n] of a block's scales with the least error, given all codes and the other scales."""
    stop = start + len(levels)
    energy = ((moment[start:stop, start:stop] @ levels) * levels).sum(0)
    gain = ((moment[start:stop] @ left) * levels).sum(0)
    return torch.where(energy > _TINY, gain / energy.clamp(min=_TINY), torch.zeros_like(gain))


def _code(left: Tensor, moment: Tensor, levels: Tensor, scale: Tensor, part: slice, grid: Grid, step: Step) -> None:
    """Choose the codes of some inputs of a block, one after another; `left`, W − Q, and `levels` change in place.

    The best value of code j is q_j + (H (W − Q))_j / H_jj, with the changes of those before it. Written with values in
    place of changes, it is the recurrence of `Step`.
    """
    own = moment[part, part]
    energy = own.diagonal().clamp(min=_TINY)[:, None]
    before = (own.tril(-1) / energy).contiguous()
    old = levels[part] * scale
    columns = (moment[part] @ left).div_(energy).add_(old).addmm_(before, old)
    values, places = torch.empty_like(old), torch.zeros(len(old), dtype=torch.int32, device=old.device)
    step(columns, values, before, places, scale[None], grid, values=True)
    levels[part] = columns
    left[part] += old - values
