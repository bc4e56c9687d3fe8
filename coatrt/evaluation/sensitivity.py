"""Sensitivity: what each format would cost each matrix, from one pass of gradients and from the encoded weights."""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from coatrt.configs.config import QuantConfig
from coatrt.configs.space import ConfigSpace
from coatrt.data.examples import Examples
from coatrt.errors import ConfigError
from coatrt.evaluation.curvature import kfac_costs, token_costs
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.evaluation.losses import mean_loss
from coatrt.evaluation.sensitivity_table import Sensitivity
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.codec import decode
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.progress import Progress, silent

__all__ = ["Predictor", "Sensitivity", "fisher_costs", "measure_sensitivity", "measured_costs", "relative_errors"]

Predictor = Literal["fisher", "kfac", "tokens"]


def _fisher(model: FakeQuantModel, blocks: Examples, progress: Progress) -> dict[str, Tensor]:
    """Return matrix → diagonal of the empirical Fisher information per token, float32 [N, K].

    The mean loss of a block of T targets has the gradient (1/T)·Σ g_t; with independent targets Σ g_t² is T² times its
    square, and the sum over all blocks is divided by their targets. Every gradient is squared and dropped as soon as it
    exists.
    """
    names = {model.model.get_submodule(m.name).weight: m.name for m in model.checkpoint.matrices.matrices}
    fisher = {name: torch.zeros_like(weight, dtype=torch.float32) for weight, name in names.items()}
    counts, total, current = blocks.counts.tolist(), blocks.predicted, 0

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
    blocks: Examples | Tensor,
    formats: Sequence[WeightFormat],
    progress: Progress = silent,
) -> dict[str, dict[str, float]]:
    """Return matrix → format text → ½·Σ F∘(W − Q(W))², F the diagonal empirical Fisher (arXiv 2509.25214).

    Args:
        model: full precision is set and no LoRA is bound; two float32 copies of the weights are in memory meanwhile.
        codes: cache of encoded matrices.
        blocks: calibration examples, or tokens [blocks, length].
        formats: formats to measure.
        progress: called after each block and each matrix.
    """
    fisher = _fisher(model, Examples.of(blocks), progress)
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


def relative_errors(
    model: FakeQuantModel, codes: CodeStore, formats: Sequence[WeightFormat], progress: Progress = silent
) -> dict[str, dict[str, float]]:
    """Return matrix → format text → ‖W − Q(W)‖ / ‖W‖ of a model at full precision."""
    errors: dict[str, dict[str, float]] = {}
    names = model.checkpoint.matrices.names
    for i, name in enumerate(names):
        weight = model.weight(name, None)
        norm = float(weight.norm().clamp(min=1e-30))
        errors[name] = {
            str(fmt): float((weight - decode(codes.get(name, fmt).to(model.compute))).norm()) / norm for fmt in formats
        }
        progress(i + 1, len(names), "errors")
    return errors


def measured_costs(
    model: FakeQuantModel,
    blocks: Tensor,
    space: ConfigSpace,
    errors: Mapping[str, Mapping[str, float]],
    progress: Progress = silent,
) -> dict[str, dict[str, float]]:
    """Return matrix → format text → cost from the measured loss with one group at a time in its worst format.

    Other formats cost as much less as their squared error is smaller. A group whose loss did not rise costs a tenth of
    the median group. The group's cost is split evenly among its matrices.

    Args:
        model: full precision is set and no LoRA is bound.
        blocks: calibration tokens [blocks, length].
        space: groups and formats.
        errors: relative errors, see `relative_errors`.
        progress: called after each group.
    """
    uniform = QuantConfig.uniform(space.model, "fp16")
    model.set_config(uniform)
    base = mean_loss(model, blocks)
    rises, worst = [], []
    for i, group in enumerate(space.groups):
        fmt = space.formats[int(np.argmax([sum(errors[name][str(f)] ** 2 for name in group) for f in space.formats]))]
        model.set_config(QuantConfig({**uniform.formats, **dict.fromkeys(group, fmt)}))
        rises.append(mean_loss(model, blocks) - base)
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


def measure_sensitivity(
    model: FakeQuantModel,
    codes: CodeStore,
    blocks: Examples | Tensor,
    formats: Sequence[WeightFormat],
    progress: Progress = silent,
    predictor: Predictor = "fisher",
) -> Sensitivity:
    """Measure every matrix in every format.

    A cost is the second-order term of the loss. It ignores how matrices interact: a ranking, not a forecast
    (docs/method.md has its rank correlation with measured losses).

    Args:
        model: it is set to full precision and its LoRA is taken away.
        codes: cache of encoded matrices.
        blocks: calibration examples, or tokens [blocks, length].
        formats: formats to measure.
        progress: called after each block and each matrix.
        predictor: "fisher" (`fisher_costs`), "kfac" or "tokens" (`coatrt.evaluation.curvature`).

    Raises:
        ConfigError: there is no such predictor.
    """
    if predictor not in get_args(Predictor):
        raise ConfigError(f"no predictor {predictor!r}; give one of {', '.join(get_args(Predictor))}")
    model.set_config(None)
    model.set_pairs(None)
    costs = _PREDICTORS[predictor](model, codes, blocks, formats, progress)
    return Sensitivity(costs, relative_errors(model, codes, formats, progress))


_PREDICTORS = {"fisher": fisher_costs, "kfac": kfac_costs, "tokens": token_costs}
