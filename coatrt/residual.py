"""A start for A and B: the low-rank part of what quantization takes away, averaged over formats."""

from collections.abc import Sequence

import torch
from torch import Tensor

from coatrt.contract import LoraContract
from coatrt.formats import WeightFormat
from coatrt.quantize import decode
from coatrt.store import CodeStore

__all__ = ["mean_residual"]


@torch.no_grad()
def mean_residual(
    codes: CodeStore, contract: LoraContract, formats: Sequence[WeightFormat]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return pairs whose product is the best approximation, of their rank, of the mean over formats of W − Q(W).

    The idea of LoftQ (arXiv 2310.08659), with one start for all formats. A has orthonormal columns, so that it begins
    with the gain that a random A has; B carries the singular values, alpha/rank taken out.

    Args:
        codes: encoded matrices and their checkpoint.
        contract: names, ranks and scale.
        formats: formats to average over.

    Returns:
        matrix name → (A [K, r], B [r, N]), float32, as `CoaLora.load_shared` takes them.
    """
    pairs = {}
    for tensor in contract.tensors:
        weight = codes.checkpoint.tensor(f"{tensor.matrix}.weight").float()
        residual = weight.clone()
        for fmt in formats:
            residual -= decode(codes.get(tensor.matrix, fmt)) / len(formats)
        left, values, right = torch.linalg.svd(residual, full_matrices=False)
        rank = min(tensor.rank, len(values))
        A, B = torch.zeros(tensor.K, tensor.rank), torch.zeros(tensor.rank, tensor.N)
        A[:, :rank] = right[:rank].T
        B[:rank] = values[:rank, None] * left[:, :rank].T / contract.scale(tensor)
        pairs[tensor.matrix] = (A, B)
    return pairs
