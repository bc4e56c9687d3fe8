"""Sensitivity: what each format would cost each matrix, from one pass of gradients and from the encoded weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coatrt.errors import ConfigError
from coatrt.examples import Examples
from coatrt.fakequant import FakeQuantModel
from coatrt.files import read_json, write_json
from coatrt.formats import WeightFormat
from coatrt.quantize import decode
from coatrt.store import CodeStore

__all__ = ["Sensitivity", "measure_sensitivity"]

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Sensitivity:
    """Costs and errors of every matrix in every format.

    Args:
        costs: matrix → format text → predicted loss increase, nats per token.
        errors: matrix → format text → ‖W − Q(W)‖ / ‖W‖.
    """

    costs: Mapping[str, Mapping[str, float]]
    errors: Mapping[str, Mapping[str, float]]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON form that `from_json` reads back."""
        return {"costs": self.costs, "errors": self.errors}

    @classmethod
    def from_json(cls, value: Any) -> "Sensitivity":
        """Return the sensitivities written by `to_json`.

        Raises:
            ConfigError: it is none.
        """
        try:
            costs, errors = (
                {name: {text: float(x) for text, x in row.items()} for name, row in value[key].items()}
                for key in ("costs", "errors")
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"the sensitivities are garbled ({error}); measure them again (coatrt train)") from None
        return cls(costs, errors)

    def save(self, path: str | Path) -> None:
        """Write the JSON form to `path`, atomically."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "Sensitivity":
        """Return the sensitivities in a JSON file."""
        return cls.from_json(read_json(path, "sensitivities"))


def _fisher(model: FakeQuantModel, blocks: Examples, progress: Progress | None) -> dict[str, Tensor]:
    """Return matrix → diagonal of the empirical Fisher information per token, float32 [N, K].

    The mean loss of a block of T targets has the gradient (1/T)·Σ g_t; with independent targets Σ g_t² is T² times its
    square, and the sum over all blocks is divided by their targets. Every gradient is squared and dropped as soon as it
    exists.
    """
    names = {model.model.get_submodule(m.name).weight: m.name for m in model.checkpoint.matrices.matrices}
    fisher = {name: torch.zeros_like(weight) for weight, name in names.items()}
    counts, total, current = blocks.counts.tolist(), blocks.predicted, 0

    def collect(weight: nn.Parameter) -> None:
        assert weight.grad is not None
        fisher[names[weight]].addcmul_(weight.grad, weight.grad, value=counts[current] ** 2 / total)
        weight.grad = None

    hooks = [weight.requires_grad_().register_post_accumulate_grad_hook(collect) for weight in names]
    try:
        for current in range(len(blocks)):
            with torch.enable_grad():
                model.loss(blocks[current : current + 1]).backward()  # type: ignore[no-untyped-call]
            if progress is not None:
                progress(current + 1, len(blocks), "gradients")
    finally:
        for hook, weight in zip(hooks, names, strict=True):
            hook.remove()
            weight.requires_grad_(False)
    return fisher


def measure_sensitivity(
    model: FakeQuantModel,
    codes: CodeStore,
    blocks: Examples | Tensor,
    formats: Sequence[WeightFormat],
    progress: Progress | None = None,
) -> Sensitivity:
    """Measure every matrix in every format.

    The cost is ½·Σ F∘(W − Q(W))², the second-order term of the loss with the diagonal empirical Fisher F as
    Hessian (as arXiv 2509.25214 weighs its allocation). It ignores how matrices interact: a ranking, not a forecast.

    Args:
        model: full precision is set and no LoRA is bound; two float32 copies of the weights are in memory meanwhile.
        codes: cache of encoded matrices.
        blocks: calibration examples, or tokens [blocks, length].
        formats: formats to measure.
        progress: called after each block and each matrix.
    """
    model.set_config(None)
    model.set_pairs(None)
    fisher = _fisher(model, Examples.of(blocks), progress)
    costs: dict[str, dict[str, float]] = {}
    errors: dict[str, dict[str, float]] = {}
    names = model.checkpoint.matrices.names
    for i, name in enumerate(names):
        weight = model.model.get_submodule(name).weight.detach()
        importance, norm = fisher.pop(name), float(weight.norm().clamp(min=1e-30))
        costs[name], errors[name] = {}, {}
        for fmt in formats:
            squared = (weight - decode(codes.get(name, fmt).to(model.compute))).square_()
            costs[name][str(fmt)] = 0.5 * float(torch.dot(importance.view(-1), squared.view(-1)))
            errors[name][str(fmt)] = float(squared.sum().sqrt()) / norm
        if progress is not None:
            progress(i + 1, len(names), "formats")
    return Sensitivity(costs, errors)
