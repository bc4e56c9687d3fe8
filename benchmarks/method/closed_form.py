"""Compensation in closed form: per (matrix, format) the low-rank part of W − Q(W) that matters most to the loss."""

from pathlib import Path

import torch
from setting import FORMATS, Setting
from torch import Tensor, nn

from coatrt.calibration import InputMoments
from coatrt.checkpoint import cache_directory
from coatrt.config import QuantConfig
from coatrt.contract import LoraContract
from coatrt.curvature import visit_outputs
from coatrt.progress import stages
from coatrt.quantize import decode
from coatrt.tensor_file import read_tensors, write_tensors
from coatrt.train_options import TrainOptions

__all__ = ["Compensation", "best_part"]

_DAMPING = 1e-4  # of the mean energy of an input, so that inputs that never move have a factor too
_LEAST_GAIN = 1e-2  # of the mean gain, so that outputs without gradient can be divided by theirs

Pair = tuple[Tensor, Tensor]


def best_part(residual: Tensor, moment: Tensor, gains: Tensor, rank: int) -> Pair:
    """Return (A [K, r], B [r, N]) whose product R takes most off Σ_n G_n (ΔW − R)_n H (ΔW − R)_nᵀ, ΔW = W − Q(W).

    Eckart and Young, after inputs are whitened and outputs scaled. Half of this sum is the loss's second-order change
    with a Fisher matrix that factors (arXiv 1503.05671), the output factor's diagonal only.

    Args:
        residual: ΔW, float32 [N, K].
        moment: H = E x xᵀ, float32 [K, K].
        gains: G_n = E g_n², float32 [N], g the gradient at the outputs.
        rank: r.
    """
    damped = moment.double() + _DAMPING * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    root = torch.linalg.cholesky(damped)
    rows = (gains + _LEAST_GAIN * gains.mean()).sqrt()[:, None]
    left, values, right = torch.linalg.svd(rows * (residual @ root.float()), full_matrices=False)
    A = torch.linalg.solve_triangular(root.T, right[:rank].T.double(), upper=True).float()
    return A, (left[:, :rank] * values[:rank] / rows).T


class Compensation(nn.Module):
    """The closed-form part of every (matrix, format): looked up, never trained.

    Args:
        setting: model, formats, codes and calibration.
        contract: the matrices that have a LoRA.
        rank: of the part.
    """

    def __init__(self, setting: Setting, contract: LoraContract, rank: int) -> None:
        super().__init__()
        path = setting.scratch / f"compensation-{setting.model}-{setting.task}-{rank}.safetensors"
        if not path.is_file():
            _compute(setting, contract, rank, path)
        found = read_tensors(path)
        assert found is not None
        self._tensors, self._names = found[0], [tensor.matrix for tensor in contract.tensors]

    def pairs(self, config: QuantConfig) -> dict[str, Pair]:
        """Return matrix name → (A [K, r], B [r, N]) of the format each matrix has."""
        return {
            name: (self._tensors[f"{name}/{config[name]}/A"], self._tensors[f"{name}/{config[name]}/B"])
            for name in self._names
        }

    def rates(self, options: TrainOptions) -> list[tuple[list[nn.Parameter], float]]:
        """Return nothing to train."""
        return []


def _compute(setting: Setting, contract: LoraContract, rank: int, path: Path) -> None:
    moments = InputMoments(setting.checkpoint, setting.tokens, cache_directory() / "moments")
    gains = {tensor.matrix: torch.zeros(tensor.N) for tensor in contract.tensors}

    def visit(name: str, _: Tensor, gradients: Tensor) -> None:
        if name in gains:
            gains[name] += gradients.square().sum(0)

    setting.base.set_config(None)
    setting.base.set_pairs(None)
    tensors: dict[str, Tensor] = {}
    with stages("compensation") as progress:
        visit_outputs(setting.base, setting.tokens.tokens, visit, progress)
        for i, tensor in enumerate(contract.tensors):
            weight = setting.checkpoint.tensor(f"{tensor.matrix}.weight").float()
            moment = moments.get(tensor.matrix)
            for text in FORMATS:
                residual = weight - decode(setting.codes.get(tensor.matrix, text))
                A, B = best_part(residual, moment, gains[tensor.matrix], rank)
                tensors[f"{tensor.matrix}/{text}/A"], tensors[f"{tensor.matrix}/{text}/B"] = A, B
            progress(i + 1, len(contract.tensors), "matrices")
    write_tensors(path, {name: value.contiguous() for name, value in tensors.items()})
