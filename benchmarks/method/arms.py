"""The arms of the evidence: ways to adapt a quantized model, compared in one training loop."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from setting import Draws
from torch import Tensor, nn

from coatrt.adapter.features import ConfigEncoder
from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import LoraContract

__all__ = ["ARMS", "Arm", "LoraBank"]


@dataclass(frozen=True)
class Arm:
    """One way to adapt.

    Args:
        what: name in the table.
        kind: "none" trains nothing, "coa" A, B and θ, "bank" one LoRA per (matrix, format), "single" one LoRA per
            configuration.
        preset: preset of θ; "none": plain LoRA.
        rank: LoRA rank.
        draws: source of the first configuration of a step; the second comes from the whole pool. "ends": the
            lowest and the highest budget in turn; "sides": the lowest three and the highest three in turn; "even": the
            whole pool.
        compensated: whether B has the compensation term (`coatrt.adapter.compensation`).
        start_share: with compensation, share of A's columns that start from the error of the lowest format; the others
            are random.
        share: share of the other arms' steps, for "single" per configuration.
        examples: times as many examples for each configuration of a step.
        rate: peak learning rate of A.
        rate_ratio: see `TrainOptions`.
        aware: attempt of `aware.AwareLora`; "": none.
    """

    what: str
    kind: Literal["none", "coa", "bank", "single"] = "coa"
    preset: Literal["none", "paper"] = "none"
    rank: int = 16
    draws: Draws = "ends"
    compensated: bool = False
    start_share: float = 0.0
    share: float = 1.0
    examples: int = 1
    rate: float = 2e-3
    rate_ratio: float | None = None
    aware: Literal["", "noise", "slope", "gentle"] = ""


_OURS = Arm("coatrt", draws="even", compensated=True, start_share=0.5, rate=1e-3)
_SIDES = replace(_OURS, draws="sides")  # as coatrt drew until November 2026
_SHARED = Arm("shared LoRA")
ARMS = {
    "none": Arm("quantized, no adapter", "none"),
    "single": Arm("LoRA per configuration, as many steps for each", "single"),
    "single-same-tokens": Arm("LoRA per configuration, as many steps and tokens for each", "single", examples=2),
    "single-shared-compute": Arm("LoRA per configuration, the compute shared out", "single", share=1 / 3),
    "shared": _SHARED,
    "shared-rates": replace(
        _SHARED, what="shared LoRA with the draws and rates of coatrt", draws="sides", rate=1e-3, rate_ratio=4.0
    ),
    "shared-rank": replace(_SHARED, what="shared LoRA of rank 32", rank=32),
    "bank": Arm("LoRA per (matrix, format), as LLM-QFA", "bank"),
    "paper": Arm("CoA-LoRA as published (its θ, even draws)", preset="paper", draws="even"),
    "coatrt": _OURS,
    "coatrt-random": replace(_OURS, what="coatrt, A from random numbers", start_share=0.0),
    "coatrt-sides": replace(_SIDES, what="coatrt, few and many bits in turn"),
    "coatrt-sides-noise": replace(
        _SIDES, what="coatrt, few and many bits in turn, C for the noise upstream", aware="noise"
    ),
    "coatrt-sides-slope": replace(
        _SIDES, what="coatrt, few and many bits in turn, B with parts proportional to noise", aware="slope"
    ),
    "coatrt-gentle": replace(_OURS, what="coatrt, B with small parts proportional to noise", aware="gentle"),
    "coatrt-faster": replace(_OURS, what="coatrt, twice the rates", rate=2e-3),
    "coatrt-slower": replace(_OURS, what="coatrt, half the rates", rate=5e-4),
    "shared-faster": replace(_SHARED, what="shared LoRA, twice the rates", rate=4e-3),
    "shared-slower": replace(_SHARED, what="shared LoRA, half the rates", rate=1e-3),
    "residual": replace(_OURS, what="residual start", start_share=1.0),
}
"""Arms by name: the rivals, ours, its variants."""


class LoraBank(nn.Module):
    """One LoRA per (matrix, format), looked up for a configuration (after LLM-QFA, ACL 2025).

    Args:
        contract: names, shapes, ranks and scale.
        encoder: order of the formats.
        seed: seed of the initial values, those of `CoaLora`.
    """

    def __init__(self, contract: LoraContract, encoder: ConfigEncoder, seed: int = 0) -> None:
        super().__init__()
        self.contract, self.encoder = contract, encoder
        generator, count = torch.Generator().manual_seed(seed), len(encoder.formats)
        self.A = nn.ParameterList(
            (torch.randn(t.K, t.rank, generator=generator) / t.K**0.5).expand(count, -1, -1).clone()
            for t in contract.tensors
        )
        self.B = nn.ParameterList(torch.zeros(count, t.rank, t.N) for t in contract.tensors)

    def pairs(self, config: QuantConfig, dtype: torch.dtype = torch.float32) -> dict[str, tuple[Tensor, Tensor]]:
        """Return matrix name → (A [K, r], s·B [r, N]) of the matrix's format."""
        ids = self.encoder.format_ids(config).tolist()
        return {
            t.matrix: (a[i].to(dtype), (b[i] * self.contract.scale(t)).to(dtype))
            for t, i, a, b in zip(self.contract.tensors, ids, self.A, self.B, strict=True)
        }

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return A and B."""
        return {"A": list(self.A), "B": list(self.B)}
