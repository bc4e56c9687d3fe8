"""Scales learned from the full-precision model, under the configurations that a planner could choose.

The codes stay; the scale of every block takes a relative change in each format, trained by distillation: the
Kullback-Leibler divergence of the quantized model's predictions from those in full precision. EfficientQAT (arXiv
2407.11062) trains scales end to end for one configuration; here every step draws others, so that one set of scales
serves them all. It costs nothing at inference.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from coatrt.configs.config import QuantConfig
from coatrt.configs.space import ConfigSpace
from coatrt.data.examples import Examples
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.learned_scales import LearnedScales
from coatrt.system.distributed import Processes
from coatrt.system.progress import Progress, silent
from coatrt.training.loop import optimise
from coatrt.training.objective import Pass
from coatrt.training.options import TrainOptions

__all__ = ["ScaleChanges", "distil", "learn_scales", "learning_budgets"]

_REACH = 1.25  # budgets to learn at, up to this many times the bits of the largest format that learns


class ScaleChanges(nn.Module):
    """Relative changes of the scales of every linear matrix in every format that can learn them, zero at first.

    The codes of a quantized checkpoint stay as it has them.

    Args:
        codes: the encoded matrices.
        space: matrices and formats.
    """

    def __init__(self, codes: CodeStore, space: ConfigSpace) -> None:
        super().__init__()
        self._targets = space.model.targets
        self._places: dict[tuple[str, str], int] = {}
        self._scales: list[Tensor] = []
        changes: list[Tensor] = []
        for matrix in space.model.targets:
            for fmt in dict.fromkeys(fmt.effective(matrix.K) for fmt in space.formats):
                if LearnedScales.can_learn(fmt) and not codes.is_stored(matrix.name, fmt):
                    scales = codes.get(matrix.name, fmt).scales
                    assert scales is not None
                    self._places[matrix.name, str(fmt)] = len(changes)
                    self._scales.append(scales)
                    changes.append(torch.zeros(scales.shape))
        self.changes = nn.ParameterList(changes)

    @property
    def learning(self) -> list[tuple[str, str]]:
        """(matrix, format text) of every change, in order."""
        return list(self._places)

    def of(self, config: QuantConfig) -> Iterator[tuple[str, nn.Parameter, int]]:
        """Yield (matrix, change float32 [N, blocks], weights per block) for the matrices that learn in their format."""
        for matrix in self._targets:
            fmt = config[matrix.name].effective(matrix.K)
            place = self._places.get((matrix.name, str(fmt)))
            if place is not None:
                yield matrix.name, self.changes[place], fmt.block

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return all of them as the group "scales"."""
        return {"scales": list(self.changes)}

    def scales(self) -> LearnedScales:
        """Return the learned scales, rounded as the formats store them."""
        return LearnedScales(
            {
                key: (self._scales[place].float() * (1 + self.changes[place].detach().cpu())).half()
                for key, place in self._places.items()
            }
        )


def distil(model: FakeQuantModel, changes: ScaleChanges, passes: Sequence[Pass], accumulate: int = 1) -> Tensor:
    """Add the gradients of the mean divergence over configurations to those of the changes.

    Args:
        model: the base model; its configuration is changed and its LoRA removed.
        changes: the changes of the scales.
        passes: configurations of the step and their rows.
        accumulate: number of parts of each batch.

    Returns:
        This process's part of the divergence per configuration, nats per token, float64 on the model's device.
    """
    losses = []
    for one in passes:
        part_losses = []
        for rows in one.batch.last.argsort(stable=True).chunk(accumulate):
            part = one.batch[rows]
            model.set_config(None)
            model.set_pairs(None)
            with torch.no_grad():
                exact = model.predictions(part)[0].log_softmax(-1)
            model.set_config(one.config)
            model.set_weights(
                (name, weight + weight * _spread(change.detach(), weight.shape[1], block))
                for name, change, block in changes.of(one.config)
                for weight in [model.weight(name, one.config[name], exact=False)]
            )
            with _collecting(model, changes, one.config, 1 / len(passes)):
                found = model.predictions(part)[0].log_softmax(-1)
                loss = nn.functional.kl_div(found, exact, log_target=True, reduction="sum") / one.total
                if loss.requires_grad:  # else no matrix of this configuration learns
                    loss.backward()  # type: ignore[no-untyped-call]
            part_losses.append(loss.detach())
        losses.append(torch.stack(part_losses).double().sum())
    return torch.stack(losses)


def _spread(change: Tensor, K: int, block: int) -> Tensor:
    """Return the change of each weight [N, K] from that of each block."""
    return change.repeat_interleave(block, 1)[:, :K]


@contextmanager
def _collecting(model: FakeQuantModel, changes: ScaleChanges, config: QuantConfig, share: float) -> Iterator[None]:
    """Add `share` of the gradients of weights to those of the changes: a weight is w · (1 + change of its block)."""
    of = {name: (change, block) for name, change, block in changes.of(config)}

    def collect(name: str, gradient: Tensor) -> None:
        change, block = of[name]
        product = gradient.float() * model.weight(name, config[name], exact=False)
        padded = nn.functional.pad(product, (0, change.shape[1] * block - product.shape[1]))
        total = padded.view(*change.shape, block).sum(-1).mul_(share)
        change.grad = total if change.grad is None else change.grad + total

    with model.weight_gradients(of, collect):
        yield


def learning_budgets(space: ConfigSpace, low: float, high: float) -> tuple[float, float]:
    """Return the lowest and the highest budget at which scales are learned, in bits per weight.

    With more bits most matrices are in formats that learn nothing.

    Args:
        space: matrices and formats.
        low: lowest budget of training.
        high: highest budget of training.
    """
    K = space.model.targets[0].K
    most = max((fmt.bits_per_weight(K) for fmt in space.formats if LearnedScales.can_learn(fmt)), default=high)
    return low, max(low, min(high, _REACH * most))


def learn_scales(
    model: FakeQuantModel,
    codes: CodeStore,
    space: ConfigSpace,
    data: Examples,
    draw: Callable[[int], Sequence[QuantConfig]],
    options: TrainOptions,
    state: Path,
    run: str,
    processes: Processes,
    progress: Progress = silent,
) -> LearnedScales:
    """Return scales learned in `options.learn_scales` steps, resuming from the last checkpoint if there is one.

    Args:
        model: the base model; its configuration is changed and its LoRA removed.
        codes: its encoded matrices.
        space: matrices and formats.
        data: examples to learn from.
        draw: step → its configurations.
        options: batch and so on of training.
        state: directory of checkpoints.
        run: identity of model, data and options.
        processes: data-parallel processes.
        progress: called after each step.
    """
    changes = ScaleChanges(codes, space).to(model.compute)
    options = replace(options, steps=options.learn_scales)
    optimise(
        model, changes, data, draw, options, state, run, processes, progress, gradients=distil, stage="learning scales"
    )
    return changes.scales()
