"""Cost predictors of formats that `coatrt train` does not use, for the comparison in `benchmarks/predictors.py`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from coatrt.configs.config import QuantConfig
from coatrt.configs.space import ConfigSpace
from coatrt.data.examples import Examples
from coatrt.evaluation.curvature import visit_outputs
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.evaluation.losses import mean_loss
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.codec import decode
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.progress import Progress, silent

__all__ = ["fisher_costs", "kfac_costs", "measured_costs"]


def _fisher(model: FakeQuantModel, blocks: Examples, progress: Progress) -> dict[str, Tensor]:
    """Return matrix → diagonal of the empirical Fisher information per token, float32 [N, K].

    The mean loss of a block of T targets has the gradient (1/T)·Σ g_t; with independent targets Σ g_t² is T² times its
    square, and the sum over all blocks is divided by their targets. Every gradient is squared and dropped as soon as it
    exists.
    """
    names = {model.model.get_submodule(m.name).weight: m.name for m in model.checkpoint.matrices.matrices}
    fisher = {name: torch.zeros_like(weight, dtype=torch.float32) for weight, name in names.items()}
    counts, total, current = blocks.counts.tolist(), blocks.target_count, 0

    def collect(weight: nn.Parameter) -> None:
        assert weight.grad is not None
        gradient = weight.grad.float()
        fisher[names[weight]].addcmul_(gradient, gradient, value=counts[current] ** 2 / total)
        weight.grad = None

    hooks = [weight.requires_grad_().register_post_accumulate_grad_hook(collect) for weight in names]
    try:
        for current in range(len(blocks)):
            with torch.enable_grad():
                model.loss(blocks[current : current + 1]).backward()  # type: ignore[no-untyped-call]
            progress(current + 1, len(blocks), "gradients")
    finally:
        for hook, weight in zip(hooks, names, strict=True):
            hook.remove()
            weight.requires_grad_(False)
    return fisher


def fisher_costs(
    model: FakeQuantModel,
    codes: CodeStore,
    examples: Examples,
    formats: Sequence[WeightFormat],
    progress: Progress = silent,
) -> dict[str, dict[str, float]]:
    """Return matrix → format text → ½·Σ F∘(W − Q(W))², F the diagonal empirical Fisher (arXiv 2509.25214).

    Args:
        model: in full precision without LoRA; needs two float32 copies of the weights.
        codes: cache of encoded matrices.
        examples: calibration examples.
        formats: formats to measure.
        progress: called after each block and each matrix.
    """
    fisher = _fisher(model, examples, progress)
    costs: dict[str, dict[str, float]] = {}
    names = model.checkpoint.matrices.names
    for i, name in enumerate(names):
        weight, importance = model.weight(name, None), fisher.pop(name).view(-1)
        costs[name] = {
            str(fmt): 0.5
            * float(importance @ (weight - decode(codes.get(name, fmt).to(model.compute))).square_().view(-1))
            for fmt in formats
        }
        progress(i + 1, len(names), "formats")
    return costs


@dataclass
class _Moments:
    """Sums over positions: of g² [N], of x xᵀ [K, K] (of the head, or of a linear layer), of g² by token id [V, K]."""

    output: Tensor | None = None
    input: Tensor | None = None
    rows: Tensor | None = None
    positions: int = 0


@dataclass
class _Kfac:
    """Collects the moments; the first matrix of a fused group stores that of the shared input."""

    first: Mapping[str, str]
    moments: dict[str, _Moments] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, name: str, x: Tensor, g: Tensor) -> None:
        here = self.moments.setdefault(name, _Moments())
        if x.dtype == torch.int64:
            rows = torch.cat([x[:, None].to(g), g.square()], 1)
            here.rows = rows if here.rows is None else torch.cat([here.rows, rows])
            return
        here.positions += len(x)
        square = g.square().sum(0)
        here.output = square if here.output is None else here.output + square
        if self.first[name] == name:
            moment = x.T @ x
            here.input = moment if here.input is None else here.input + moment


def kfac_costs(
    model: FakeQuantModel,
    codes: CodeStore,
    examples: Examples,
    formats: Sequence[WeightFormat],
    progress: Progress = silent,
) -> dict[str, dict[str, float]]:
    """Return matrix → format text → ½ Σ_n G_n ΔW_n H ΔW_nᵀ, nats per target.

    G_n = Σ g_n² per target, H = E[x xᵀ] over positions: the Fisher of Kronecker factors (Martens and Grosse, arXiv
    1503.05671) with the output factor's diagonal. An embedding's input is one-hot: its rows are weighted by the g² of
    their own tokens.

    Args:
        model: in full precision without LoRA; needs one float32 [K, K] per fused group.
        codes: cache of encoded matrices.
        examples: calibration examples.
        formats: formats to measure.
        progress: called after each batch and each matrix.
    """
    groups = model.checkpoint.matrices.groups
    first = {name: group[0] for group in groups for name in group}
    moments = _Kfac(first)
    visit_outputs(model, examples, moments, progress)
    names = model.checkpoint.matrices.names
    costs: dict[str, dict[str, float]] = {}
    for i, name in enumerate(names):
        here, moment = moments.moments.get(name, _Moments()), moments.moments.get(first[name], _Moments()).input
        costs[name] = {}
        weight = model.weight(name, None)
        for fmt in formats:
            residual, total = weight - decode(codes.get(name, fmt).to(model.compute)), 0.0
            if here.output is not None and moment is not None:
                total += float(here.output @ ((residual @ moment) * residual).sum(1)) / here.positions
            if here.rows is not None:
                ids = here.rows[:, 0].long()
                total += float((here.rows[:, 1:] * residual[ids].square()).sum())
            costs[name][str(fmt)] = 0.5 * total / examples.target_count
        progress(i + 1, len(names), "formats")
    return costs


def measured_costs(
    model: FakeQuantModel,
    examples: Examples,
    space: ConfigSpace,
    errors: Mapping[str, Mapping[str, float]],
    progress: Progress = silent,
) -> dict[str, dict[str, float]]:
    """Return matrix → format text → cost from the measured loss with one group at a time in its worst format.

    Other formats cost as much less as their squared error is smaller. A group whose loss did not rise costs a tenth of
    the median group. The group's cost is split evenly among its matrices.

    Args:
        model: in full precision without LoRA.
        examples: calibration examples.
        space: groups and formats.
        errors: relative errors, see `coatrt.evaluation.curvature.relative_errors`.
        progress: called after each group.
    """
    uniform = QuantConfig.uniform(space.model, "fp16")
    model.set_config(uniform)
    base = mean_loss(model, examples)
    rises, worst = [], []
    for i, group in enumerate(space.groups):
        fmt = space.formats[int(np.argmax([sum(errors[name][str(f)] ** 2 for name in group) for f in space.formats]))]
        model.set_config(QuantConfig({**uniform.formats, **dict.fromkeys(group, fmt)}))
        rises.append(mean_loss(model, examples) - base)
        worst.append(str(fmt))
        progress(i + 1, len(space.groups), "groups")
    model.set_config(None)
    least = 0.1 * max(float(np.median(rises)), 1e-6)
    return {
        name: {
            str(fmt): max(rise, least) / len(group) * (errors[name][str(fmt)] / max(errors[name][top], 1e-30)) ** 2
            for fmt in space.formats
        }
        for group, rise, top in zip(space.groups, rises, worst, strict=True)
        for name in group
    }
