"""Checks codes of error feedback in float64, independent of the order in which their sums were computed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from coatrt.quantization.codec import QuantizedMatrix, decode, decode_scales

__all__ = ["Ties", "output_error", "ties_of"]


@dataclass(frozen=True)
class Ties:
    """Codes that are not the nearest to the remainder of their weight, given all codes before them.

    Args:
        count: number of such codes.
        worst: largest distance of a remainder from the midpoint of both levels, in steps between them; half a step
            would be a wrong code.
    """

    count: int
    worst: float


def ties_of(weight: Tensor, matrix: QuantizedMatrix, order: Tensor, factor: Tensor) -> Ties:
    """Count the codes that float64 would choose differently.

    The remainders of all weights follow from the codes at once: with E the errors divided by their pivots, W − Q = E U.

    Args:
        weight: W [N, K].
        matrix: its codes, on the same device as the other arguments.
        order: order of the inputs, see `coatrt.quantization.gptq.InverseFactors.get`.
        factor: U, in that order.
    """
    grid, K = matrix.grid, matrix.K
    scales = decode_scales(matrix)[:, order // (matrix.format.block or K)].double()
    level = grid.value(matrix.codes[:, :K])[:, order].double()
    U = factor.double()
    difference = weight.double()[:, order] - level * scales
    errors = torch.linalg.solve_triangular(U, difference, upper=True, left=False)
    remainder = (level * scales + errors * U.diagonal()) / torch.where(scales != 0, scales, torch.ones_like(scales))
    nearest = grid.value(grid.nearest(remainder.float())).double()
    step = (nearest - level).abs()
    beyond = ((remainder - level).abs() - (remainder - nearest).abs()) / step.clamp(min=1e-30) / 2
    wrong = (step > 0) & (beyond > 0)
    return Ties(int(wrong.sum()), float(torch.where(wrong, beyond, torch.zeros_like(beyond)).max()))


def output_error(weight: Tensor, matrix: QuantizedMatrix, moment: Tensor) -> float:
    """Return tr((W − Q) H (W − Q)ᵀ)."""
    difference = (weight.float() - decode(matrix)).double()
    return float(((difference @ moment.double()) * difference).sum())
