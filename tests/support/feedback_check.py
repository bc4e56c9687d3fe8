"""Whether codes of error feedback are right, in float64, whatever order the sums of their making were taken in."""

from dataclasses import dataclass

import torch
from torch import Tensor

from coatrt.quantization.codec import QuantizedMatrix, decode, decode_scales
from coatrt.quantization.grid import Grid

__all__ = ["Ties", "output_error", "ties_of"]


@dataclass(frozen=True)
class Ties:
    """Codes that are not the nearest to what was left of their weight, all codes before them given.

    Args:
        count: how many.
        worst: the largest distance of what was left from half way between both levels, in steps between them; half a
            step would be a plainly wrong code.
    """

    count: int
    worst: float


def ties_of(weight: Tensor, matrix: QuantizedMatrix, order: Tensor, factor: Tensor) -> Ties:
    """Count the codes that float64 chooses otherwise.

    What was left of all weights follows from the codes at once: with E the errors by their pivots, W − Q = E U.

    Args:
        weight: W [N, K].
        matrix: its codes, on the same device as all others.
        order: of the inputs, see `coatrt.quantization.gptq.InverseFactors.get`.
        factor: U, in that order.
    """
    grid, K = Grid(matrix.format.kind), matrix.K
    scales = decode_scales(matrix)[:, order // (matrix.format.block or K)].double()
    level = grid.value(matrix.codes[:, :K])[:, order].double()
    U = factor.double()
    lost = weight.double()[:, order] - level * scales
    errors = torch.linalg.solve_triangular(U, lost, upper=True, left=False)
    left = (level * scales + errors * U.diagonal()) / torch.where(scales != 0, scales, torch.ones_like(scales))
    nearest = grid.value(grid.nearest(left.float())).double()
    step = (nearest - level).abs()
    beyond = ((left - level).abs() - (left - nearest).abs()) / step.clamp(min=1e-30) / 2
    wrong = (step > 0) & (beyond > 0)
    return Ties(int(wrong.sum()), float(torch.where(wrong, beyond, torch.zeros_like(beyond)).max()))


def output_error(weight: Tensor, matrix: QuantizedMatrix, moment: Tensor) -> float:
    """Return tr((W − Q) H (W − Q)ᵀ)."""
    lost = (weight.float() - decode(matrix)).double()
    return float(((lost @ moment.double()) * lost).sum())
