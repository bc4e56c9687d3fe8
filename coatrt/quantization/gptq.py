"""Error feedback: weights coded one input at a time, the inputs still to come making up for what was lost.

GPTQ (Frantar et al., arXiv 2210.17323) with scales fixed beforehand, so that one loop serves every format: the column
whose input carries the most energy goes first, and blocks of scales need not be contiguous in that order.
"""

import numpy as np
import torch
from torch import Tensor

from coatrt.errors import FormatError
from coatrt.quantization.feedback_blocks import block_codes
from coatrt.quantization.float32 import full_float32
from coatrt.quantization.grid import Grid

__all__ = ["DAMPING", "InverseFactors", "feedback_codes", "inverse_factor", "shrunk"]

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


def inverse_factor(moment: Tensor) -> Tensor:
    """Return U, upper triangular [K, K], with UᵀU = (H + λI)⁻¹ and λ = `DAMPING` · mean(diag H).

    The inverse is never formed: with H = RRᵀ, R upper triangular (a Cholesky factor of H in reversed order), U = R⁻¹.
    λ grows tenfold as long as float32 finds the matrix indefinite.

    Args:
        moment: H, float32 [K, K], symmetric.

    Raises:
        FormatError: the moment holds values that are not finite.
    """
    if not torch.isfinite(moment).all():
        raise FormatError("the second moment of an input is not finite; calibrate with other text")
    shift = DAMPING * max(float(moment.diagonal().mean()), 1e-30)
    with full_float32():
        while True:
            damped = moment.flip(0, 1)
            damped.diagonal().add_(shift)
            lower, failed = torch.linalg.cholesky_ex(damped)
            del damped  # on a GPU every matrix of this size counts
            if not failed:
                identity = torch.eye(len(moment), device=moment.device)
                factor: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
                return factor
            shift *= 10


class InverseFactors:
    """Orders of inputs and inverse factors of second moments; the last one is kept.

    Whoever encodes matrices holds one of these: every format of every matrix that reads one input needs the same.
    """

    def __init__(self) -> None:
        self._key: tuple[Tensor, int | None] | None = None
        self._value: tuple[Tensor, Tensor] | None = None

    def get(self, moment: Tensor, tokens: int | None) -> tuple[Tensor, Tensor]:
        """Return the order of the inputs, most energy first, and the inverse factor [K, K] in that order.

        Args:
            moment: H, float32 [K, K]; its elements must not change while the factor is kept.
            tokens: see `shrunk`.
        """
        if self._value is None or self._key is None or self._key[0] is not moment or self._key[1] != tokens:
            self._key = self._value = None  # frees the last one before the next is made
            order = moment.diagonal().argsort(descending=True, stable=True)
            self._value = order, inverse_factor(shrunk(moment, tokens)[order][:, order])
            self._key = moment, tokens
        return self._value


def feedback_codes(weight: Tensor, scales: Tensor, block: int, grid: Grid, order: Tensor, factor: Tensor) -> Tensor:
    """Return codes that keep tr((W − Q) H (W − Q)ᵀ) small instead of every single |w − q|.

    Args:
        weight: W, float32 [N, K]; all others lie on its device.
        scales: as decoding uses them, float32 [N, blocks].
        block: weights along K that share a scale.
        grid: the levels.
        order: of the inputs, see `InverseFactors.get`.
        factor: of the inverse of H = E[x xᵀ], in that order.

    Returns:
        [N, K] in the grid's dtype.
    """
    if weight.device.type != "cpu":
        return block_codes(weight, scales, block, grid, order, factor)
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
