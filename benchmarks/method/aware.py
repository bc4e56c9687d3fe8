"""Ways to let a LoRA depend on more of a configuration than each matrix's own format: attempts, measured as arms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coatrt.adapter.compensation import _DAMPING, _RIDGE, Compensator
from coatrt.adapter.lora import CoaLora
from coatrt.configs.config import QuantConfig
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.quantization.input_moments import InputMoments, visit_inputs
from coatrt.quantization.weight_format import WeightFormat

__all__ = ["AwareLora", "NoisyMoments", "UpstreamNoise", "noisy_moments"]

_ORDER = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}


class UpstreamNoise:
    """How much noise reaches each matrix: sum of the costs of the matrices before it, relative to a reference.

    Args:
        places: layer and kind of every target module.
        costs: matrix → format → predicted rise of the loss.
        reference: configuration whose sum over all matrices is 1.
        most: maximum of the relative noise.
    """

    def __init__(
        self,
        places: Mapping[str, tuple[int, str]],
        costs: Mapping[str, Mapping[str, float]],
        reference: QuantConfig,
        most: float,
    ) -> None:
        self._place = {name: 4 * layer + _ORDER[kind] for name, (layer, kind) in places.items()}
        self._costs, self._most = costs, most
        self._unit = sum(costs[name][str(reference[name])] for name in self._place)

    def of(self, config: QuantConfig) -> tuple[dict[str, float], float]:
        """Return the relative noise that reaches each matrix, and that of the whole configuration."""
        sums = [0.0] * (max(self._place.values()) + 2)
        for name, place in self._place.items():
            sums[place + 1] += self._costs[name][str(config[name])] / self._unit
        for i in range(1, len(sums)):
            sums[i] += sums[i - 1]
        return {name: min(self._most, sums[place]) for name, place in self._place.items()}, min(self._most, sums[-1])


@dataclass(frozen=True)
class NoisyMoments:
    """Moments of inputs under one configuration: H̃ = E[x̃ x̃ᵀ] + δI and X = E[x x̃ᵀ] + δI, float32 [K, K] by leader."""

    energy: dict[str, Tensor]
    cross: dict[str, Tensor]


@torch.no_grad()
def noisy_moments(model: FakeQuantModel, moments: InputMoments, config: QuantConfig) -> NoisyMoments:
    """Return the moments of inputs x̃ under a configuration beside x in full precision, no LoRA."""
    leaders = sorted({moments.leader[t.name] for t in model.checkpoint.matrices.targets})
    energy: dict[str, Tensor] = {}
    cross: dict[str, Tensor] = {}
    clean: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        if name not in energy:
            energy[name], cross[name] = (x.new_zeros(x.shape[1], x.shape[1]) for _ in range(2))
        energy[name].addmm_(x.T, x)
        cross[name].addmm_(clean[name].T, x)

    tokens = moments.calibration.tokens
    model.set_pairs(None)
    for rows in tokens.split(4):  # as many as `visit_inputs` runs at once
        model.set_config(None)
        visit_inputs(model.model, rows, leaders, clean.__setitem__)
        model.set_config(config)
        visit_inputs(model.model, rows, leaders, add)
    model.set_config(None)
    for name in leaders:
        delta = _DAMPING * energy[name].diagonal().mean()
        for values in (energy[name], cross[name]):
            values.diagonal().add_(delta)
            values.div_(tokens.numel())
    return NoisyMoments(energy, cross)


class _NoisyCompensator:
    """C under upstream noise: argmin E‖W x − Q(W) x̃ − CᵀAᵀx̃‖²."""

    def __init__(self, model: FakeQuantModel, leader: Mapping[str, str], noisy: NoisyMoments) -> None:
        self._model, self._leader, self._noisy = model, leader, noisy

    @torch.no_grad()
    def terms(self, matrices: Sequence[str], formats: Sequence[WeightFormat], A: Tensor) -> Tensor:
        """Return C, float32 [m, r, N], for A [m, K, r]."""
        found = []
        for name, fmt, a in zip(matrices, formats, A, strict=True):
            leader = self._leader[name]
            HA, XA = self._noisy.energy[leader] @ a, self._noisy.cross[leader] @ a
            gram = (a.T @ HA).double()
            gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
            right = self._model.weight(name, None, False) @ XA - self._model.weight(name, fmt, False) @ HA
            found.append(torch.linalg.solve(gram, right.T.double()).float())
        return torch.stack(found)


class AwareLora(nn.Module):
    """A `CoaLora` with compensation and one of the attempts.

    "noise": C interpolates between that without upstream noise and that under the reference's, by what lies upstream.
    "slope": B gets a trained part proportional to the noise upstream and one to the noise of the whole configuration.
    "gentle": the same, a quarter as steep, so that B moves 1.5 times as far in a step at the reference, not thrice.

    Args:
        lora: the LoRA, compensated.
        attempt: which.
        noise: upstream noise of configurations.
        noisy: for "noise": model, leaders and moments.
    """

    def __init__(
        self,
        lora: CoaLora,
        attempt: str,
        noise: UpstreamNoise,
        noisy: tuple[FakeQuantModel, Mapping[str, str], NoisyMoments] | None = None,
    ) -> None:
        super().__init__()
        self.lora, self._attempt, self._noise = lora, attempt, noise
        self._noisy = _NoisyCompensator(*noisy) if noisy is not None else None
        count = 0 if attempt == "noise" else 2
        self.more = nn.ParameterList(B.new_zeros(count, *B.shape) for B in lora.B) if count else nn.ParameterList()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return A and B."""
        groups = self.lora.parameter_groups()
        return {**groups, "B": [*groups["B"], *self.more]}

    def pairs(self, config: QuantConfig, dtype: torch.dtype = torch.float32) -> dict[str, tuple[Tensor, Tensor]]:
        """Return matrix → (A, B) of a configuration."""
        pairs, contract = self.lora.pairs(config, dtype), self.lora.contract
        upstream, total = self._noise.of(config)
        ids = self.lora.encoder.format_ids(config)
        for i, (rows, A, _) in enumerate(self.lora.stacks()):
            names = [contract.tensors[row].matrix for row in rows]
            u = torch.tensor([upstream[name] for name in names])[:, None, None]
            if self._attempt in ("slope", "gentle"):
                steep = contract.scale(contract.tensors[rows[0]]) * (0.25 if self._attempt == "gentle" else 1.0)
                more = steep * (u * self.more[i][0] + total * self.more[i][1])
            else:
                assert self._noisy is not None
                formats = [self.lora.encoder.formats[f] for f in ids[rows].tolist()]
                compensator = self.lora._compensator
                assert isinstance(compensator, Compensator)
                own = compensator.terms(names, formats, self.lora._read(compensator, i, names, A), exact=False)
                more = u * (self._noisy.terms(names, formats, A.detach()) - own)
            for name, extra in zip(names, more, strict=True):
                a, b = pairs[name]
                pairs[name] = (a, b + extra.to(dtype))
        return pairs
