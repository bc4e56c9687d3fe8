"""Error feedback: weights coded one input at a time, the inputs still to come making up for what was lost.

GPTQ (Frantar et al., arXiv 2210.17323) with scales fixed beforehand, so that one loop serves every format: the column
whose input carries the most energy goes first, and blocks of scales need not be contiguous in that order.
"""

import weakref

import torch
from torch import Tensor

from coatrt.errors import FormatError
from coatrt.levels import Grid

__all__ = ["DAMPING", "feedback_codes", "inverse_factor"]

DAMPING = 0.01
"""Share of the mean diagonal added to the diagonal of the second moment, as in GPTQ."""

_LAZY = 128  # columns coded before the rest of the matrix hears of their errors


def inverse_factor(moment: Tensor, damping: float = DAMPING) -> Tensor:
    """Return U, upper triangular [K, K], with UᵀU = (H + λI)⁻¹ and λ = `damping` · mean(diag H).

    The inverse is never formed: with H = RRᵀ, R upper triangular (a Cholesky factor of H in reversed order), U = R⁻¹.
    λ grows tenfold as long as float32 finds the matrix indefinite.

    Args:
        moment: H, float32 [K, K], symmetric.
        damping: share of the mean diagonal.

    Raises:
        FormatError: the moment holds values that are not finite.
    """
    if not torch.isfinite(moment).all():
        raise FormatError("the second moment of an input is not finite; calibrate with other text")
    identity = torch.eye(len(moment))
    shift = damping * max(float(moment.diagonal().mean()), 1e-30)
    while True:
        lower, failed = torch.linalg.cholesky_ex((moment + shift * identity).flip(0, 1))
        if not failed:
            factor: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            return factor
        shift *= 10


def _prepared(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return the order of the inputs, most energy first, and the inverse factor in that order.

    The last one is kept for as long as its moment lives: every format of every matrix that reads this input needs it.
    """
    global _last
    version = moment._version
    if _last is not None and _last[0]() is moment and _last[1] == version:
        return _last[2]
    order = moment.diagonal().argsort(descending=True, stable=True)
    found = order, inverse_factor(moment[order][:, order])
    _last = (weakref.ref(moment, _forget), version, found)
    return found


def _forget(_: object) -> None:
    global _last
    _last = None


_last: tuple[weakref.ref[Tensor], int, tuple[Tensor, Tensor]] | None = None


def feedback_codes(weight: Tensor, scales: Tensor, block: int, grid: Grid, moment: Tensor) -> Tensor:
    """Return codes that keep tr((W − Q) H (W − Q)ᵀ) small instead of every single |w − q|.

    Args:
        weight: W, float32 [N, K].
        scales: as decoding uses them, float32 [N, blocks].
        block: weights along K that share a scale.
        grid: the levels.
        moment: H = E[x xᵀ], float32 [K, K].

    Returns:
        [N, K] in the grid's dtype.
    """
    N, K = weight.shape
    order, factor = _prepared(moment)
    pivots = factor.diagonal().tolist()
    left = weight.t()[order]  # [K, N]: a column of W lies in one piece
    spans, blocks = scales.t().contiguous(), (order // block).tolist()
    divisors = torch.where(spans != 0, spans, torch.ones_like(spans))
    codes = torch.empty(K, N, dtype=grid.dtype)
    errors = torch.empty(_LAZY, N)
    for start in range(0, K, _LAZY):
        stop = min(start + _LAZY, K)
        for j in range(start, stop):
            code = grid.nearest(left[j] / divisors[blocks[j]])
            error = errors[j - start]
            torch.addcmul(left[j], grid.value(code), spans[blocks[j]], value=-1, out=error)
            error /= pivots[j]
            left[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
            codes[j] = code.to(grid.dtype)
        left[stop:].addmm_(factor[start:stop, stop:].t(), errors[: stop - start], alpha=-1)
    return codes[order.argsort()].t().contiguous()
