"""Error feedback: weights are coded one input at a time, and later inputs compensate earlier errors.

GPTQ (Frantar et al., arXiv 2210.17323) with scales fixed in advance, so that one loop serves every format. Columns are
ordered by the energy of their input, largest first; scale blocks need not be contiguous in that order.
"""

import torch
from torch import Tensor

from coatrt.errors import FormatError
from coatrt.quantization.feedback_blocks import BLOCK, Step, row_parts, step_for
from coatrt.quantization.float32 import full_float32
from coatrt.quantization.grid import Grid

__all__ = ["DAMPING", "InverseFactors", "damped", "feedback_codes", "inverse_factor", "shrink"]

DAMPING = 0.01
"""Share of the mean diagonal added to the diagonal of the second moment, as in GPTQ."""


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


def damped(moment: Tensor) -> Tensor:
    """Return H + λI with λ = `DAMPING` · mean(diag H): rounding errors count in directions without inputs, too."""
    result = moment.clone()
    result.diagonal().add_(DAMPING * moment.diagonal().mean())
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


def feedback_codes(
    weight: Tensor,
    scales: Tensor,
    block: int,
    grid: Grid,
    order: Tensor,
    factor: Tensor,
    step: Step | None = None,
) -> Tensor:
    """Return codes that make tr((W − Q) H (W − Q)ᵀ) small rather than each |w − q|.

    Args:
        weight: W, float32 [N, K], on any device; the other tensors are on the same device.
        scales: as decoding uses them, float32 [N, blocks].
        block: weights along K that share a scale.
        grid: the levels.
        order: order of the inputs, see `InverseFactors.get`.
        factor: factor of the inverse of H = E[x xᵀ], in that order.
        step: codes the columns of a block; None: the fastest for the device.

    Returns:
        [N, K] in the grid's dtype.
    """
    step, places = step or step_for(weight.device), (order // block).int()
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    with full_float32():
        for part in row_parts(weight):
            levels = _levels(weight[part], scales[part], places, grid, order, factor, step)
            codes[part, order] = grid.nearest(levels).to(grid.dtype).view(torch.uint8).t()
    return codes.view(grid.dtype)


def _levels(
    weight: Tensor, scales: Tensor, places: Tensor, grid: Grid, order: Tensor, factor: Tensor, step: Step
) -> Tensor:
    """Return the levels [K, n] of some rows of W in the order of the inputs."""
    remaining = weight.t()[order].contiguous()
    spans = scales.t().contiguous()
    errors = torch.empty(BLOCK, remaining.shape[1], device=remaining.device)
    for start in range(0, len(remaining), BLOCK):
        stop = min(start + BLOCK, len(remaining))
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
