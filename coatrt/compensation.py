"""Compensation: what the LoRA of a matrix can make up for in its quantization, in closed form for every format."""

import torch
from torch import Tensor

from coatrt.calibration import InputMoments
from coatrt.contract import LoraContract, LoraTensor
from coatrt.fakequant import FakeQuantModel
from coatrt.formats import WeightFormat

__all__ = ["Compensator"]

_DAMPING = 1e-4  # of the mean energy of an input, so that inputs that never move count too
_LEAST_GAIN = 1e-2  # of the mean gain of an output, so that outputs without gradient count too
_RIDGE = 1e-6  # of the mean energy of A's outputs, so that columns of A that nearly agree can be told apart
_OVERSAMPLING, _ITERATIONS = 16, 6  # of the randomized singular value decomposition


class Compensator:
    """Gives the term C of B that takes most off what quantization changes at a matrix's outputs, A given.

    C = argmin E‖(W − Q(W))x − CᵀAᵀx‖² = (AᵀHA)⁻¹AᵀH(W − Q(W))ᵀ with H = E[x xᵀ]: the least squares of LQER and QERA
    (arXiv 2402.02446, 2410.06040) inside the subspace that A reads, so that C costs no rank of its own and follows A
    while A is trained.

    Memory: H, float32 [K, K], once for matrices that read the same input, and W as the checkpoint stores it, both on
    the device of the model.

    Args:
        model: decodes weights.
        moments: of the inputs of every matrix.
        contract: the matrices that have a LoRA.
    """

    def __init__(self, model: FakeQuantModel, moments: InputMoments, contract: LoraContract) -> None:
        self._model = model
        self._weights: dict[str, Tensor] = {}
        self._moments: dict[str, Tensor] = {}
        shared: dict[str, Tensor] = {}
        for tensor in contract.tensors:
            leader = moments.leader(tensor.matrix)
            if leader not in shared:
                moment = moments.get(tensor.matrix).to(model.compute, torch.float32, copy=True)
                moment.diagonal().add_(_DAMPING * moment.diagonal().mean())
                shared[leader] = moment
            self._moments[tensor.matrix] = shared[leader]
            self._weights[tensor.matrix] = model.checkpoint.tensor(f"{tensor.matrix}.weight").to(model.compute)

    @torch.no_grad()
    def term(self, matrix: str, fmt: WeightFormat, A: Tensor) -> Tensor:
        """Return C, float32 [r, N].

        Args:
            matrix: name of the matrix.
            fmt: the format it has.
            A: float32 [K, r].
        """
        read = self._moments[matrix] @ A
        lost = self._weights[matrix].float() @ read - self._model.weight(matrix, fmt) @ read
        energy = (A.T @ read).double()
        energy.diagonal().add_(_RIDGE * energy.diagonal().mean())
        term: Tensor = torch.linalg.solve(energy, lost.T.double())
        return term.float()

    @torch.no_grad()
    def start(self, tensor: LoraTensor, fmt: WeightFormat, gains: Tensor, seed: int) -> Tensor:
        """Return an A whose C takes most off the loss in one format.

        To second order the loss rises by ½ Σ_n G_n ΔW_n H ΔW_nᵀ (arXiv 1503.05671, the output factor's diagonal only),
        so A reads the leading right singular vectors of G^½(W − Q(W))H^½, by Eckart and Young. Columns have unit norm,
        as random ones have in the mean; where the matrix has fewer directions than columns, random ones follow.

        Args:
            tensor: the matrix.
            fmt: the format.
            gains: G, float32 [N], see `coatrt.curvature.output_gains`.
            seed: of the randomized decomposition.

        Returns:
            float32 [K, r].
        """
        root = torch.linalg.cholesky(self._moments[tensor.matrix].double())
        rows = (gains + _LEAST_GAIN * gains.mean()).sqrt()[:, None]
        lost = self._weights[tensor.matrix].float() - self._model.weight(tensor.matrix, fmt)
        count = min(tensor.rank, tensor.N, tensor.K)
        with torch.random.fork_rng(devices=[root.device] if root.device.type == "cuda" else []):
            torch.manual_seed(seed)
            width = min(count + _OVERSAMPLING, tensor.N, tensor.K)
            _, _, right = torch.svd_lowrank(rows * (lost @ root.float()), q=width, niter=_ITERATIONS)
            more = torch.randn(tensor.K, tensor.rank - count, device=root.device)
        A = torch.linalg.solve_triangular(root.T, right[:, :count].double(), upper=True).float()
        return torch.cat([A / A.norm(dim=0), more / more.norm(dim=0)], 1)
