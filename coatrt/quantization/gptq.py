"""Error feedback: weights are coded one input at a time, and later inputs compensate earlier errors.

GPTQ (Frantar et al., arXiv 2210.17323) with scales fixed in advance, so that one loop serves every format. Columns are
ordered by the energy of their input, largest first; scale blocks need not be contiguous in that order.
"""

import numpy as np
import torch
from torch import Tensor

from coatrt.errors import FormatError
from coatrt.quantization.feedback_blocks import block_codes
from coatrt.quantization.float32 import full_float32
from coatrt.quantization.grid import Grid

__all__ = ["DAMPING", "InverseFactors", "feedback_codes", "inverse_factor", "shrink"]

DAMPING = 0.01
"""Share of the mean diagonal added to the diagonal of the second moment, as in GPTQ."""

_LAZY = 64  # columns coded before their errors are propagated to the rest of the matrix
_ROWS = 4096  # rows of W coded together; their errors stay in the CPU cache


def shrink(moment: Tensor, tokens: int | None) -> Tensor:
    """Return H with its off-diagonal elements times T / (T + K), as T tokens estimate K² correlations poorly.

    Correlations estimated from few tokens are mostly noise, which error feedback would fit. This factor is within 1 %
    of the least output error on other text (`benchmarks/shrinkage.py`, docs/evidence/quantizers.md). For shrinkage in
    general see Schäfer and Strimmer (2005), doi 10.2202/1544-6115.1175.

    Args:
        moment: H = E[x xᵀ] over the tokens, float32 [K, K].
        tokens: T; None: H is exact and returned unchanged.
    """
    if tokens is None:
        return moment
    result = moment * (tokens / (tokens + len(moment)))
    result.diagonal().copy_(moment.diagonal())
    return result


def inverse_factor(moment: Tensor) -> Tensor:
    """Return U, upper triangular [K, K], with UᵀU = (H + λI)⁻¹ and λ = `DAMPING` · mean(diag H).

    The inverse is never formed: with H = RRᵀ, R upper triangular (a Cholesky factor of H in reversed order), U = R⁻¹.
    λ grows tenfold while the matrix is indefinite in float32.

    Args:
        moment: H, float32 [K, K], symmetric.

    Raises:
        FormatError: a value of the moment is not finite.
    """
    if not torch.isfinite(moment).all():
        raise FormatError("the second moment of an input is not finite; use other calibration text")
    shift = DAMPING * max(float(moment.diagonal().mean()), 1e-30)
    with full_float32():
        while True:
            damped = moment.flip(0, 1)
            damped.diagonal().add_(shift)
            lower, info = torch.linalg.cholesky_ex(damped)
            del damped  # GPU memory holds few matrices of this size
            if not info:
                identity = torch.eye(len(moment), device=moment.device)
                factor: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
                return factor
            shift *= 10


class InverseFactors:
    """Cache of the last order of inputs and inverse factor of a second moment.

    Every format of every matrix with the same input needs the same factor.
    """

    def __init__(self) -> None:
        self._key: tuple[Tensor, int | None] | None = None
        self._value: tuple[Tensor, Tensor] | None = None

    def get(self, moment: Tensor, tokens: int | None) -> tuple[Tensor, Tensor]:
        """Return the order of the inputs, most energy first, and the inverse factor [K, K] in that order.

        Args:
            moment: H, float32 [K, K]; its elements must not change while its factor is cached.
            tokens: see `shrink`.
        """
        if self._value is None or self._key is None or self._key[0] is not moment or self._key[1] != tokens:
            self._key = self._value = None  # frees the old factor before the next one is computed
            order = moment.diagonal().argsort(descending=True, stable=True)
            self._value = order, inverse_factor(shrink(moment, tokens)[order][:, order])
            self._key = moment, tokens
        return self._value


def feedback_codes(weight: Tensor, scales: Tensor, block: int, grid: Grid, order: Tensor, factor: Tensor) -> Tensor:
    """Return codes that make tr((W − Q) H (W − Q)ᵀ) small rather than each |w − q|.

    Args:
        weight: W, float32 [N, K]; the other tensors are on its device.
        scales: as decoding uses them, float32 [N, blocks].
        block: weights along K that share a scale.
        grid: the levels.
        order: order of the inputs, see `InverseFactors.get`.
        factor: factor of the inverse of H = E[x xᵀ], in that order.

    Returns:
        [N, K] in the grid's dtype.
    """
    if weight.device.type != "cpu":
        return block_codes(weight, scales, block, grid, order, factor)
    blocks = (order // block).tolist()
    codes = torch.empty(weight.shape[1], len(weight), dtype=grid.dtype)
    for start in range(0, len(weight), _ROWS):
        part = slice(start, start + _ROWS)
        remaining = weight[part].t()[order]  # [K, n]: columns of W are contiguous
        spans = scales[part].t().contiguous()
        _code_rows(remaining, spans, blocks, factor, grid, codes[:, part])
    return codes[order.argsort()].t().contiguous()


def _code_rows(remaining: Tensor, spans: Tensor, blocks: list[int], factor: Tensor, grid: Grid, codes: Tensor) -> None:
    """Fill `codes` [K, n] for `remaining`, the rows of Wᵀ [K, n], which are overwritten.

    The errors of a block reach each later column of the block in one product when it is coded, and the rest of the
    matrix in one product at the block's end. numpy, because a step on a few hundred numbers costs torch ten times more.
    """
    K = len(remaining)
    columns, scales, out = remaining.numpy(), spans.numpy(), codes.view(torch.uint8).numpy()
    divisors = np.where(scales != 0, scales, np.float32(1))
    before, pivots = factor.t().contiguous().numpy(), factor.diagonal().numpy()
    snap, dtype = grid.row_snapper(), np.int8 if grid.dtype == torch.int8 else np.uint8
    errors = torch.empty(_LAZY, remaining.shape[1])
    block_errors = errors.numpy()
    for start in range(0, K, _LAZY):
        stop = min(start + _LAZY, K)
        for j in range(start, stop):
            column, block = columns[j], blocks[j]
            if j > start:
                column -= before[j, start:j] @ block_errors[: j - start]
            code, level = snap(column / divisors[block])
            out[j] = code.astype(dtype).view(np.uint8)
            error = block_errors[j - start]
            np.subtract(column, np.multiply(level, scales[block], out=error), out=error)
            error /= pivots[j]
        remaining[stop:].addmm_(factor[start:stop, stop:].t(), errors[: stop - start], alpha=-1)
