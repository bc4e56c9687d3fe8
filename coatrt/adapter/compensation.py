"""Compensation: a closed-form term per format with which the LoRA of a matrix offsets its quantization error."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coatrt.configs.lora_contract import LoraContract, LoraTensor
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.quantization.input_moments import InputMoments, visit_inputs
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.progress import Progress, silent

__all__ = ["Compensator", "Reading"]

_DAMPING = 1e-4  # share of the mean energy of the inputs, so that constant-zero inputs count too
_MIN_GAIN = 1e-2  # share of the mean gain of the outputs, so that outputs without gradient count too
_RIDGE = 1e-6  # share of the mean energy of A's outputs, so that nearly parallel columns of A stay distinguishable
_MAX_TOKENS = 4096  # tokens whose inputs are stored: many times the rank
_STACKED = 1 << 28  # bytes of matrices that a GPU stacks for one batched product
_OVERSAMPLING, _ITERATIONS = 16, 6  # parameters of the randomized singular value decomposition


def _stacks(matrices: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield matrices of one shape in stacks, float32 [m, N, K]; one at a time on the CPU, where calls are cheap."""
    part: list[Tensor] = []
    for matrix in matrices:
        part.append(matrix)
        if matrix.device.type == "cpu" or 4 * matrix.numel() * (len(part) + 1) > _STACKED:
            yield (torch.stack(part) if len(part) > 1 else matrix[None]).float()
            part.clear()
    if part:
        yield torch.stack(part).float()


def _products(matrices: Iterable[Tensor], others: Tensor, gram: bool = False) -> Tensor:
    """Return W A of every matrix W [N, K] and its A [K, r], or Wᵀ W A if `gram`; float32 [m, N or K, r]."""
    start, parts = 0, []
    for stack in _stacks(matrices):
        product = stack @ others[start : start + len(stack)]
        parts.append(stack.mT @ product if gram else product)
        start += len(stack)
    return torch.cat(parts)


class _Gram:
    """H = E[x xᵀ] + δI of one input, δ a ten-thousandth of its mean energy.

    It is stored as a matrix, or as the inputs if these are smaller.

    Args:
        values: H without δ, float32 [K, K], modified in place: δ is added; or the inputs x, bfloat16 [T, K].
    """

    def __init__(self, values: Tensor) -> None:
        self._values, self._is_moment = values, values.dtype == torch.float32
        energy = values.diagonal() if self._is_moment else values.float().square()
        self._damping = _DAMPING * energy.mean()
        if self._is_moment:
            values.diagonal().add_(self._damping)

    @staticmethod
    def products(grams: "Sequence[_Gram]", A: Tensor) -> Tensor:
        """Return H A for m inputs of the same width and stored in the same way, float32 [m, K, r]."""
        values = [gram._values for gram in grams]
        if grams[0]._is_moment:
            return _products(values, A)
        dampings = torch.stack([gram._damping for gram in grams])
        return _products(values, A, gram=True).div_(len(values[0])).addcmul_(A, dampings[:, None, None])

    def root(self) -> Tensor:
        """Return the lower Cholesky factor of H, float64 [K, K]."""
        moment = x = self._values.double()
        if not self._is_moment:
            moment = (x.T @ x).div_(len(x))
            moment.diagonal().add_(self._damping)
        root: Tensor = torch.linalg.cholesky(moment)
        return root


def _inputs(model: FakeQuantModel, tokens: Tensor, names: Sequence[str], progress: Progress) -> dict[str, Tensor]:
    """Return name → inputs of the matrix in full precision, bfloat16 [T, K], for all tokens in order.

    This sets the model to full precision and removes its LoRA.
    """
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    model.set_config(None)
    model.set_pairs(None)
    visit_inputs(
        model.model, tokens, names, lambda name, x: inputs[name].append(x.bfloat16()), progress, "measuring inputs"
    )
    return {name: torch.cat(parts) for name, parts in inputs.items()}


@dataclass(frozen=True)
class Reading:
    """The part of C that depends on A alone, shared by all configurations of a step; for m matrices of one shape.

    Args:
        HA: H A, float32 [m, K, r].
        WHA: W H A, float32 [m, N, r].
        factors: LU factors of AᵀHA, float64 [m, r, r].
        pivots: pivots of the factors, int32 [m, r].
    """

    HA: Tensor
    WHA: Tensor
    factors: Tensor
    pivots: Tensor


class Compensator:
    """Computes the term C of B that minimises the output error of quantization for a given A.

    C = argmin E‖(W − Q(W))x − CᵀAᵀx‖² = (AᵀHA)⁻¹AᵀH(W − Q(W))ᵀ with H = E[x xᵀ]: the least squares of LQER and QERA
    (arXiv 2402.02446, 2410.06040) in the subspace of A, so that C needs no additional rank and follows A during
    training.

    Memory on the device of the model: once per fused group H, float32 [K, K], or, if smaller, the inputs x of the first
    4,096 calibration tokens in bfloat16; and W as the checkpoint stores it.

    Args:
        model: decodes weights; it is set to full precision and its LoRA is removed.
        moments: second moments of the inputs of every matrix.
        contract: the target modules.
        progress: called while inputs are collected.
    """

    def __init__(
        self,
        model: FakeQuantModel,
        moments: InputMoments,
        contract: LoraContract,
        progress: Progress = silent,
    ) -> None:
        self._model = model
        self._weights = {
            tensor.matrix: model.checkpoint.tensor(f"{tensor.matrix}.weight").to(model.compute)
            for tensor in contract.tensors
        }
        leaders = {moments.leader[tensor.matrix]: tensor.K for tensor in contract.tensors}
        tokens = moments.calibration.tokens
        tokens = tokens[: max(1, _MAX_TOKENS // tokens.shape[1])]
        # bfloat16 [T, K] has fewer bytes than float32 [K, K]
        small = [name for name, K in leaders.items() if tokens.numel() < 2 * K]
        values = _inputs(model, tokens, small, progress) if small else {}
        for name in leaders:
            if name not in values:
                values[name] = moments.get(name).to(model.compute, torch.float32, copy=True)
        grams = {name: _Gram(values[name]) for name in leaders}
        self._grams = {tensor.matrix: grams[moments.leader[tensor.matrix]] for tensor in contract.tensors}

    @torch.no_grad()
    def reading(self, matrices: Sequence[str], A: Tensor) -> Reading:
        """Return the part of C that depends on A alone, for any format.

        Args:
            matrices: names of m matrices of one shape.
            A: float32 [m, K, r].
        """
        HA = _Gram.products([self._grams[name] for name in matrices], A)
        energy = (A.mT @ HA).double()
        diagonal = energy.diagonal(dim1=1, dim2=2)
        diagonal.add_(_RIDGE * diagonal.mean(1, keepdim=True))
        factors, pivots, _ = torch.linalg.lu_factor_ex(energy)  # the checked form would wait for the GPU
        WHA = _products((self._weights[name] for name in matrices), HA)
        return Reading(HA, WHA, factors, pivots)

    @torch.no_grad()
    def terms(
        self, matrices: Sequence[str], formats: Sequence[WeightFormat], reading: Reading, exact: bool = True
    ) -> Tensor:
        """Return C, float32 [m, r, N].

        Args:
            matrices: names of the matrices.
            formats: format of each matrix.
            reading: see `reading`.
            exact: see `FakeQuantModel.weight`.
        """
        now = (self._model.weight(name, fmt, exact) for name, fmt in zip(matrices, formats, strict=True))
        residual = reading.WHA - _products(now, reading.HA)
        term: Tensor = torch.linalg.lu_solve(reading.factors, reading.pivots, residual.mT.double())
        return term.float()

    @torch.no_grad()
    def start(self, tensor: LoraTensor, fmt: WeightFormat, gains: Tensor, seed: int, share: float = 1.0) -> Tensor:
        """Return the A whose C reduces the loss most in one format.

        To second order the loss rises by ½ Σ_n G_n ΔW_n H ΔW_nᵀ (arXiv 1503.05671, diagonal of the output factor only),
        so by Eckart and Young A projects on the leading right singular vectors of G^½(W − Q(W))H^½. Columns have unit
        norm, the mean norm of random ones, and a positive largest element, so that signs do not depend on the machine.
        Columns beyond min(N, K) are random.

        Args:
            tensor: the matrix.
            fmt: the format.
            gains: G, float32 [N], see `coatrt.evaluation.curvature.output_gains`.
            seed: seed of the randomized decomposition and of the random columns, which are the same on every device.
            share: share of the columns with such directions; the others are random.

        Returns:
            float32 [K, r].
        """
        root = self._grams[tensor.matrix].root()
        rows = (gains + _MIN_GAIN * gains.mean()).sqrt()[:, None]
        residual = self._weights[tensor.matrix].float() - self._model.weight(tensor.matrix, fmt)
        count = min(round(share * tensor.rank), tensor.N, tensor.K)
        if not residual.any():  # the codes of a quantized checkpoint may be exact: there are no directions
            count = 0
        with torch.random.fork_rng(devices=[root.device] if root.device.type == "cuda" else []):
            torch.manual_seed(seed)
            width = min(count + _OVERSAMPLING, tensor.N, tensor.K)
            _, _, right = torch.svd_lowrank(rows * (residual @ root.float()), q=width, niter=_ITERATIONS)
            if root.is_cuda:  # the GPU has its own generator: advance the CPU's as the decomposition does there
                torch.randn(min(tensor.N, tensor.K), width)
            more = torch.randn(tensor.K, tensor.rank - count).to(root.device)
        A = torch.linalg.solve_triangular(root.T, right[:, :count].double(), upper=True).float()
        A *= A.gather(0, A.abs().argmax(0)[None]).sign()
        return torch.cat([A / A.norm(dim=0), more / more.norm(dim=0)], 1)
