"""The second moment of what one matrix reads: as a matrix, or as the inputs themselves where these are smaller."""

from collections.abc import Sequence

import torch
from torch import Tensor

from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.quantization.input_moments import visit_inputs
from coatrt.system.progress import Progress, silent

__all__ = ["Gram", "collect_inputs", "inputs_are_smaller"]

_DAMPING = 1e-4  # of the mean energy of an input, so that inputs that never move count too


def inputs_are_smaller(tokens: int, K: int) -> bool:
    """Return whether bfloat16 inputs [tokens, K] take fewer bytes than a float32 moment [K, K]."""
    return tokens < 2 * K


class Gram:
    """H = E[x xᵀ] + δI of one input, δ a ten-thousandth of its mean energy.

    Args:
        held: H before δ, float32 [K, K], not copied: δ is added to it; or the inputs x themselves, bfloat16 [T, K].
    """

    def __init__(self, held: Tensor) -> None:
        self._held, self._is_moment = held, held.dtype == torch.float32
        energy = held.diagonal() if self._is_moment else held.float().square()
        self._damping = float(_DAMPING * energy.mean())
        if self._is_moment:
            held.diagonal().add_(self._damping)

    def __matmul__(self, A: Tensor) -> Tensor:
        """Return H A, float32 [K, r]."""
        x = self._held.float()
        if self._is_moment:
            return x @ A
        product: Tensor = (x.T @ (x @ A)).div_(len(x)).add_(A, alpha=self._damping)
        return product

    def root(self) -> Tensor:
        """Return the lower Cholesky factor of H, float64 [K, K]."""
        moment = x = self._held.double()
        if not self._is_moment:
            moment = (x.T @ x).div_(len(x))
            moment.diagonal().add_(self._damping)
        root: Tensor = torch.linalg.cholesky(moment)
        return root


def collect_inputs(
    model: FakeQuantModel, tokens: Tensor, names: Sequence[str], progress: Progress = silent
) -> dict[str, Tensor]:
    """Return name → what the matrix reads in full precision, bfloat16 [T, K], all tokens in their order.

    Args:
        model: it is set to full precision and its LoRA is taken away; the inputs are on its device.
        tokens: int64 [blocks, length].
        names: of linear matrices.
        progress: called after each batch.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    model.set_config(None)
    model.set_pairs(None)
    visit_inputs(model.model, tokens, names, lambda name, x: found[name].append(x.bfloat16()), progress, "inputs")
    return {name: torch.cat(parts) for name, parts in found.items()}
