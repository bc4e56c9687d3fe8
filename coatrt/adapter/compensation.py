"""Compensation: what the LoRA of a matrix can make up for in its quantization, in closed form for every format."""

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

_DAMPING = 1e-4  # of the mean energy of an input, so that inputs that never move count too
_LEAST_GAIN = 1e-2  # of the mean gain of an output, so that outputs without gradient count too
_RIDGE = 1e-6  # of the mean energy of A's outputs, so that columns of A that nearly agree can be told apart
_MOST_TOKENS = 4096  # whose inputs are kept: many times a rank
_STACKED = 1 << 28  # bytes of matrices that a GPU copies together, so that their products are one
_OVERSAMPLING, _ITERATIONS = 16, 6  # of the randomized singular value decomposition


def _stacks(matrices: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield matrices of one shape in stacks, float32 [m, N, K]: of one on the CPU, where products outweigh calls."""
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
    done, parts = 0, []
    for stack in _stacks(matrices):
        product = stack @ others[done : done + len(stack)]
        parts.append(stack.mT @ product if gram else product)
        done += len(stack)
    return torch.cat(parts)


class _Gram:
    """H = E[x xᵀ] + δI of one input, δ a ten-thousandth of its mean energy.

    It is held as a matrix, or as the inputs themselves where these are smaller.

    Args:
        held: H before δ, float32 [K, K], not copied: δ is added to it; or the inputs x, bfloat16 [T, K].
    """

    def __init__(self, held: Tensor) -> None:
        self._held, self._is_moment = held, held.dtype == torch.float32
        energy = held.diagonal() if self._is_moment else held.float().square()
        self._damping = _DAMPING * energy.mean()
        if self._is_moment:
            held.diagonal().add_(self._damping)

    @staticmethod
    def products(grams: "Sequence[_Gram]", A: Tensor) -> Tensor:
        """Return H A of m inputs of one width, which are held in one way, float32 [m, K, r]."""
        held = [gram._held for gram in grams]
        if grams[0]._is_moment:
            return _products(held, A)
        dampings = torch.stack([gram._damping for gram in grams])
        return _products(held, A, gram=True).div_(len(held[0])).addcmul_(A, dampings[:, None, None])

    def root(self) -> Tensor:
        """Return the lower Cholesky factor of H, float64 [K, K]."""
        moment = x = self._held.double()
        if not self._is_moment:
            moment = (x.T @ x).div_(len(x))
            moment.diagonal().add_(self._damping)
        root: Tensor = torch.linalg.cholesky(moment)
        return root


def _inputs(model: FakeQuantModel, tokens: Tensor, names: Sequence[str], progress: Progress) -> dict[str, Tensor]:
    """Return name → what the matrix reads in full precision, bfloat16 [T, K], all tokens in their order.

    The model is set to full precision and its LoRA is taken away.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    model.set_config(None)
    model.set_pairs(None)
    visit_inputs(model.model, tokens, names, lambda name, x: found[name].append(x.bfloat16()), progress, "inputs")
    return {name: torch.cat(parts) for name, parts in found.items()}


@dataclass(frozen=True)
class Reading:
    """What C takes from A alone, so that all configurations of a step share it; of m matrices of one shape.

    Args:
        moved: H A, float32 [m, K, r].
        kept: W H A, float32 [m, N, r].
        factors: LU factors of AᵀHA, float64 [m, r, r].
        pivots: of the factors, int32 [m, r].
    """

    moved: Tensor
    kept: Tensor
    factors: Tensor
    pivots: Tensor


class Compensator:
    """Gives the term C of B that takes most off what quantization changes at a matrix's outputs, A given.

    C = argmin E‖(W − Q(W))x − CᵀAᵀx‖² = (AᵀHA)⁻¹AᵀH(W − Q(W))ᵀ with H = E[x xᵀ]: the least squares of LQER and QERA
    (arXiv 2402.02446, 2410.06040) inside the subspace that A reads, so that C costs no rank of its own and follows A
    while A is trained.

    Memory, on the device of the model: H, float32 [K, K], or, where these are smaller, the inputs x of the first 4,096
    calibration tokens in bfloat16, once for matrices that read the same input; and W as the checkpoint stores it.

    Args:
        model: decodes weights; it is set to full precision and its LoRA is taken away.
        moments: of the inputs of every matrix.
        contract: the matrices that have a LoRA.
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
        tokens = tokens[: max(1, _MOST_TOKENS // tokens.shape[1])]
        small = [name for name, K in leaders.items() if tokens.numel() < 2 * K]  # bytes of [T, K] below those of [K, K]
        held = _inputs(model, tokens, small, progress) if small else {}
        for name in leaders:
            if name not in held:
                held[name] = moments.get(name).to(model.compute, torch.float32, copy=True)
        grams = {name: _Gram(held[name]) for name in leaders}
        self._grams = {tensor.matrix: grams[moments.leader[tensor.matrix]] for tensor in contract.tensors}

    @torch.no_grad()
    def reading(self, matrices: Sequence[str], A: Tensor) -> Reading:
        """Return what C takes from A alone, whatever the format.

        Args:
            matrices: names of m matrices of one shape.
            A: float32 [m, K, r].
        """
        moved = _Gram.products([self._grams[name] for name in matrices], A)
        energy = (A.mT @ moved).double()
        diagonal = energy.diagonal(dim1=1, dim2=2)
        diagonal.add_(_RIDGE * diagonal.mean(1, keepdim=True))
        factors, pivots, _ = torch.linalg.lu_factor_ex(energy)  # its checked form waits for a GPU
        kept = _products((self._weights[name] for name in matrices), moved)
        return Reading(moved, kept, factors, pivots)

    @torch.no_grad()
    def terms(
        self, matrices: Sequence[str], formats: Sequence[WeightFormat], reading: Reading, exact: bool = True
    ) -> Tensor:
        """Return C, float32 [m, r, N].

        Args:
            matrices: names of the matrices.
            formats: the format each of them has.
            reading: see `reading`.
            exact: see `FakeQuantModel.weight`.
        """
        now = (self._model.weight(name, fmt, exact) for name, fmt in zip(matrices, formats, strict=True))
        lost = reading.kept - _products(now, reading.moved)
        term: Tensor = torch.linalg.lu_solve(reading.factors, reading.pivots, lost.mT.double())
        return term.float()

    @torch.no_grad()
    def start(self, tensor: LoraTensor, fmt: WeightFormat, gains: Tensor, seed: int, share: float = 1.0) -> Tensor:
        """Return an A whose C takes most off the loss in one format.

        To second order the loss rises by ½ Σ_n G_n ΔW_n H ΔW_nᵀ (arXiv 1503.05671, the output factor's diagonal only),
        so A reads the leading right singular vectors of G^½(W − Q(W))H^½, by Eckart and Young. Columns have unit norm,
        as random ones have in the mean, and a positive largest element, so that no machine's choice of signs matters.
        Where the matrix has fewer directions than columns, random ones follow.

        Args:
            tensor: the matrix.
            fmt: the format.
            gains: G, float32 [N], see `coatrt.evaluation.curvature.output_gains`.
            seed: of the randomized decomposition and of the random columns, which are the same on every device.
            share: of the columns that read such directions; the others are random.

        Returns:
            float32 [K, r].
        """
        root = self._grams[tensor.matrix].root()
        rows = (gains + _LEAST_GAIN * gains.mean()).sqrt()[:, None]
        lost = self._weights[tensor.matrix].float() - self._model.weight(tensor.matrix, fmt)
        count = min(round(share * tensor.rank), tensor.N, tensor.K)
        with torch.random.fork_rng(devices=[root.device] if root.device.type == "cuda" else []):
            torch.manual_seed(seed)
            width = min(count + _OVERSAMPLING, tensor.N, tensor.K)
            _, _, right = torch.svd_lowrank(rows * (lost @ root.float()), q=width, niter=_ITERATIONS)
            if root.is_cuda:  # which has drawn its numbers elsewhere: the next are those that follow on the CPU
                torch.randn(min(tensor.N, tensor.K), width)
            more = torch.randn(tensor.K, tensor.rank - count).to(root.device)
        A = torch.linalg.solve_triangular(root.T, right[:, :count].double(), upper=True).float()
        A *= A.gather(0, A.abs().argmax(0)[None]).sign()
        return torch.cat([A / A.norm(dim=0), more / more.norm(dim=0)], 1)
