"""Error feedback: weights coded one input at a time, the inputs still to come making up for what was lost.

GPTQ (Frantar et al., arXiv 2210.17323) with scales fixed beforehand, so that one loop serves every format: the column
whose input carries the most energy goes first, and blocks of scales need not be contiguous in that order.
"""

import weakref

import numpy as np
import torch
from torch import Tensor

from coatrt.errors import FormatError
from coatrt.quantization.grid import Grid

__all__ = ["DAMPING", "feedback_codes", "inverse_factor", "shrunk"]

DAMPING = 0.01
"""Share of the mean diagonal added to the diagonal of the second moment, as in GPTQ."""

_LAZY = 64  # columns coded before the rest of the matrix hears of their errors
_ROWS = 4096  # rows of W coded together: their errors stay in cache


def shrunk(moment: Tensor, tokens: int | None) -> Tensor:
    """Return H with its off-diagonal elements times T / (T + K): T tokens do not tell K² correlations well.

    The better part of the sampled correlations of few tokens is chance, and feedback would spend its freedom on it. The
    share is the one that leaves the least output error on other text, within 1 % (`benchmarks/shrinkage.py`,
    docs/formats.md); that one should shrink: Schäfer and Strimmer (2005), doi 10.2202/1544-6115.1175.

    Args:
        moment: H = E[x xᵀ] over the tokens, float32 [K, K].
        tokens: T; None: H is exact, and returned as it is.
    """
    if tokens is None:
        return moment
    kept = moment * (tokens / (tokens + len(moment)))
    kept.diagonal().copy_(moment.diagonal())
    return kept


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


def _prepared(moment: Tensor, tokens: int | None) -> tuple[Tensor, Tensor]:
    """Return the order of the inputs, most energy first, and the inverse factor in that order.

    The last one is kept for as long as its moment lives: every format of every matrix that reads this input needs it.
    """
    global _last
    version = moment._version, tokens
    if _last is not None and _last[0]() is moment and _last[1] == version:
        return _last[2]
    order = moment.diagonal().argsort(descending=True, stable=True)
    found = order, inverse_factor(shrunk(moment, tokens)[order][:, order])
    _last = (weakref.ref(moment, _forget), version, found)
    return found


def _forget(_: object) -> None:
    global _last
    _last = None


_last: tuple[weakref.ref[Tensor], tuple[int, int | None], tuple[Tensor, Tensor]] | None = None


def feedback_codes(
    weight: Tensor, scales: Tensor, block: int, grid: Grid, moment: Tensor, tokens: int | None = None
) -> Tensor:
    """Return codes that keep tr((W − Q) H (W − Q)ᵀ) small instead of every single |w − q|.

    Args:
        weight: W, float32 [N, K].
        scales: as decoding uses them, float32 [N, blocks].
        block: weights along K that share a scale.
        grid: the levels.
        moment: H = E[x xᵀ], float32 [K, K].
        tokens: how many it is the mean of, see `shrunk`.

    Returns:
        [N, K] in the grid's dtype.
    """
    order, factor = _prepared(moment, tokens)
    blocks = (order // block).tolist()
    codes = torch.empty(weight.shape[1], len(weight), dtype=grid.dtype)
    for start in range(0, len(weight), _ROWS):
        part = slice(start, start + _ROWS)
        left = weight[part].t()[order]  # [K, n]: a column of W lies in one piece
        spans = scales[part].t().contiguous()
        _code_rows(left, spans, blocks, factor, grid, codes[:, part])
    return codes[order.argsort()].t().contiguous()


def _code_rows(left: Tensor, spans: Tensor, blocks: list[int], factor: Tensor, grid: Grid, codes: Tensor) -> None:
    """Fill `codes` [K, n] for the rows `left` [K, n] of Wᵀ, which are used up.

    A column hears of the errors before it when its turn comes, in one product; those of whole spans of columns reach
    the rest of the matrix together. numpy, because a step on a few hundred numbers costs torch ten times as much.
    """
    K = len(left)
    columns, scales, out = left.numpy(), spans.numpy(), codes.view(torch.uint8).numpy()
    divisors = np.where(scales != 0, scales, np.float32(1))
    before, pivots = factor.t().contiguous().numpy(), factor.diagonal().numpy()
    snap, dtype = grid.row_snapper(), np.int8 if grid.dtype == torch.int8 else np.uint8
    errors = torch.empty(_LAZY, left.shape[1])
    made = errors.numpy()
    for start in range(0, K, _LAZY):
        stop = min(start + _LAZY, K)
        for j in range(start, stop):
            column, block = columns[j], blocks[j]
            if j > start:
                column -= before[j, start:j] @ made[: j - start]
            code, level = snap(column / divisors[block])
            out[j] = code.astype(dtype).view(np.uint8)
            error = made[j - start]
            np.subtract(column, np.multiply(level, scales[block], out=error), out=error)
            error /= pivots[j]
        left[stop:].addmm_(factor[start:stop, stop:].t(), errors[: stop - start], alpha=-1)
