"""The arms of the evidence: every way to adapt a quantized model that a reviewer would name, in one training loop."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from setting import Draws
from torch import Tensor, nn

from coatrt.adapter.features import ConfigEncoder
from coatrt.adapter.hypernetwork import Hypernetwork, HypernetworkOptions
from coatrt.adapter.lora import CoaLora
from coatrt.adapter.preset import Preset
from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import LoraContract

__all__ = ["ARMS", "Arm", "Gates", "LoraBank", "Terms"]


@dataclass(frozen=True)
class Arm:
    """One way to adapt.

    Args:
        what: for the table.
        kind: "none" trains nothing, "coa" A, B and θ, "bank" one LoRA per (matrix, format), "terms" A, B and θ with a
            learnt term of B per (matrix, format), "single" one LoRA per configuration, "ramp" A, B and θ with a term of
            B that grows with the loss predicted for the configuration, "gates" A, B and a θ that gives every matrix one
            factor per rank, "untrained" A and the compensation as they start.
        preset: form of θ ("none": plain LoRA).
        rank: LoRA rank.
        draws: what the first configuration of a step is drawn from; the second comes from the whole pool. "lowest": two
            steps of three the lowest three budgets, the lowest most often, the third the highest three; "ends": the
            lowest and the highest budget in turn; "sides": the lowest three and the highest three in turn; "low": the
            lowest three; "even": the whole pool.
        compensated: whether B has a term per format in closed form (`coatrt.adapter.compensation`).
        started: with compensation, the share of A's columns that start from what the lowest format takes away; the
            others start from random numbers.
        share: of the steps of the other arms, for "single" per configuration.
        rate: peak learning rate of A.
        rate_ratio: see `TrainOptions`.
        theta_rate: peak learning rate of θ.
        same_examples: see `TrainOptions`.
        turns: whether the two configurations of a step take turns, each in an optimizer step of its own.
    """

    what: str
    kind: Literal["none", "coa", "bank", "terms", "single", "ramp", "gates", "untrained"] = "coa"
    preset: Preset = "coatrt"
    rank: int = 16
    draws: Draws = "ends"
    compensated: bool = False
    started: float = 0.0
    share: float = 1.0
    rate: float = 2e-3
    rate_ratio: float | None = None
    theta_rate: float = 1e-3
    same_examples: bool = False
    turns: bool = False


_OURS = Arm("coatrt", preset="none", draws="sides", compensated=True, started=0.5, rate=1e-3)
_RANDOM = replace(_OURS, what="coatrt, A from random numbers", started=0.0)
_RESIDUAL = replace(_OURS, what="residual start", started=1.0)
_LOW = replace(_RESIDUAL, what=f"{_RESIDUAL.what}, low draws", draws="low")
_SHARED = Arm("shared LoRA", preset="none")
_PAPER = Arm("CoA-LoRA as published (its θ, even draws)", preset="paper", draws="even")
_SAME = replace(_LOW, what=f"{_LOW.what}, same examples", same_examples=True)
_THETA = Arm("CoA-LoRA without compensation, same examples", same_examples=True)
ARMS = {
    "none": Arm("quantized, no adapter", "none"),
    "single": Arm("LoRA per configuration, as many steps for each", "single", "none"),
    "single-shared-compute": Arm("LoRA per configuration, the compute shared out", "single", "none", share=1 / 3),
    "shared": _SHARED,
    "shared-rates": replace(
        _SHARED, what="shared LoRA with the draws and rates of coatrt", draws="sides", rate=1e-3, rate_ratio=4.0
    ),
    "shared-rank": replace(_SHARED, what="shared LoRA of rank 32", rank=32),
    "bank": Arm("LoRA per (matrix, format), as LLM-QFA", "bank", "none"),
    "paper": _PAPER,
    "coatrt": _OURS,
    "coatrt-rank": replace(_OURS, what="coatrt of rank 32", rank=32),
    "coatrt-random": _RANDOM,
    "coatrt-random-lowest": replace(_RANDOM, what=f"{_RANDOM.what}, the lowest budgets most often", draws="lowest"),
    "single-compensated": replace(
        _OURS, what="LoRA per configuration with compensation, as many steps for each", kind="single"
    ),
    "untrained": replace(_RESIDUAL, what="compensation before any step", kind="untrained"),
    "residual": _RESIDUAL,
    "residual-rank": replace(_RESIDUAL, what=f"{_RESIDUAL.what}, rank 32", rank=32),
    "residual-slow": replace(_RESIDUAL, what=f"{_RESIDUAL.what}, half the rates", rate=5e-4),
    "residual-ends": replace(_RESIDUAL, what=f"{_RESIDUAL.what}, the ends of the range in turn", draws="ends"),
    "residual-low": _LOW,
    "residual-low-turns": replace(_LOW, what=f"{_LOW.what}, one configuration in a step, twice the steps", turns=True),
    "low-uncompensated": replace(
        _LOW, what="coatrt without compensation, low draws", compensated=False, started=0.0, rate_ratio=4.0
    ),
    "same-residual": _SAME,
    "same-residual-theta": replace(_SAME, what=f"{_SAME.what}, and θ", preset="coatrt"),
    "same-residual-theta-slow": replace(
        _SAME, what=f"{_SAME.what}, and θ at a tenth of the rate", preset="coatrt", theta_rate=1e-4
    ),
    "same-residual-gates": replace(_SAME, what=f"{_SAME.what}, and θ as a gate per rank", kind="gates"),
    "same-residual-ends": replace(
        _SAME, what=f"{_RESIDUAL.what}, the ends of the range in turn, same examples", draws="ends"
    ),
    "same-shared": replace(_SHARED, what="shared LoRA, same examples", same_examples=True),
    "same-shared-low": replace(_SHARED, what="shared LoRA, low draws, same examples", draws="low", same_examples=True),
    "same-paper": replace(_PAPER, what=f"{_PAPER.what}, same examples", same_examples=True),
    "same-theta": _THETA,
    "same-theta-low": replace(_THETA, what=f"{_THETA.what}, low draws", draws="low"),
    "same-theta-fast": replace(_THETA, what=f"{_THETA.what}, θ at ten times the rate", theta_rate=1e-2),
    "same-theta-terms": replace(_THETA, what=f"{_THETA.what}, a learnt term of B per (matrix, format)", kind="terms"),
    "same-ramp-low": Arm(
        "shared LoRA and a term of B for the predicted loss, low draws, same examples",
        "ramp",
        "none",
        draws="low",
        same_examples=True,
    ),
}
"""Arms by name: the rivals, ours, its variants; after "same-" all configurations of a step see the same examples."""


class LoraBank(nn.Module):
    """One LoRA for each (matrix, format): what a configuration gets is looked up (after LLM-QFA, ACL 2025).

    Args:
        contract: names, shapes, ranks and scale.
        encoder: the formats' order.
        seed: of the start values, those of `CoaLora`.
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

    def pairs(self, config: QuantConfig) -> dict[str, tuple[Tensor, Tensor]]:
        """Return matrix name → (A [K, r], s·B [r, N]) of the format each matrix has."""
        ids = self.encoder.format_ids(config).tolist()
        return {
            t.matrix: (a[i], b[i] * self.contract.scale(t))
            for t, i, a, b in zip(self.contract.tensors, ids, self.A, self.B, strict=True)
        }

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return A and B."""
        return {"A": list(self.A), "B": list(self.B)}


class Terms(nn.Module):
    """A LoRA whose B has a learnt term that depends on the configuration, zero at the start: B' = B + h·D_i.

    Args:
        lora: the LoRA; its A is left as it is.
        count: terms of each matrix.
        choose: configuration → (i of each matrix, h).
    """

    def __init__(self, lora: CoaLora, count: int, choose: Callable[[QuantConfig], tuple[list[int], float]]) -> None:
        super().__init__()
        self.lora, self.choose = lora, choose
        self.D = nn.ParameterList(torch.zeros(count, t.rank, t.N) for t in lora.contract.tensors)

    def pairs(self, config: QuantConfig) -> dict[str, tuple[Tensor, Tensor]]:
        """Return matrix name → (A' [K, r], s·(B + h·D_i) [r, N])."""
        (which, h), found, contract = self.choose(config), self.lora.pairs(config), self.lora.contract
        return {
            t.matrix: (found[t.matrix][0], found[t.matrix][1] + d[i] * (h * contract.scale(t)))
            for t, i, d in zip(contract.tensors, which, self.D, strict=True)
        }

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the LoRA's groups, the terms with B."""
        groups = self.lora.parameter_groups()
        return {**groups, "B": [*groups["B"], *self.D]}


class Gates(nn.Module):
    """A LoRA whose ranks θ turns up and down: B' = s·(1 + g)∘B + C, g one number per rank.

    Args:
        lora: the LoRA, without a θ of its own; the square root of its rank is a whole number.
        seed: of θ's start values.
    """

    def __init__(self, lora: CoaLora, seed: int = 0) -> None:
        super().__init__()
        self.lora, encoder = lora, lora.encoder
        width = math.isqrt(lora.contract.rank)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            options = HypernetworkOptions("coatrt", width, encoder.layers, len(encoder.module_kinds))
            self.theta = Hypernetwork(options)

    def pairs(self, config: QuantConfig) -> dict[str, tuple[Tensor, Tensor]]:
        """Return matrix name → (A [K, r], B' [r, N])."""
        encoder, contract = self.lora.encoder, self.lora.contract
        ids, found = encoder.format_ids(config), self.lora.pairs(config)
        device = next(self.theta.parameters()).device
        gates = self.theta(encoder.indices(ids).to(device), encoder.features(ids).to(device)).flatten(1)
        for rows, _, B in self.lora.stacks():
            for row, b in zip(rows, B, strict=True):
                tensor = contract.tensors[row]
                A, whole = found[tensor.matrix]
                found[tensor.matrix] = (A, whole + contract.scale(tensor) * gates[row][:, None] * b)
        return found

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the LoRA's groups and θ."""
        return {**self.lora.parameter_groups(), "theta": list(self.theta.parameters())}
