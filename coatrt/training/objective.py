"""The gradients of a step: the task's loss under each of its configurations."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from coatrt.configs.config import QuantConfig
from coatrt.data.examples import Examples
from coatrt.evaluation.fake_quant import FakeQuantModel

__all__ = ["LoraModule", "Pass", "Trainable", "accumulate_gradients"]


class Trainable(Protocol):
    """A module that the loop trains."""

    def parameter_groups(self) -> Mapping[str, list[nn.Parameter]]:
        """Return the trained parameters by the name of their learning rate (`TrainOptions.rates`)."""

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Return every parameter by name."""


class LoraModule(Trainable, Protocol):
    """It provides the LoRA pair of each matrix for a configuration."""

    def pairs(self, config: QuantConfig, dtype: torch.dtype = torch.float32) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Return matrix name → (A [K, r], scaled B [r, N]), computed in float32 and then cast."""


@dataclass(frozen=True)
class Pass:
    """One configuration of a step and its rows.

    Args:
        config: the configuration.
        batch: rows of this process.
        total: number of targets in the batch over all processes, the divisor of loss sums.
    """

    config: QuantConfig
    batch: Examples
    total: int


def accumulate_gradients(
    model: FakeQuantModel, lora: LoraModule, passes: Sequence[Pass], accumulate: int = 1
) -> Tensor:
    """Add the gradients of the mean loss over configurations to those of the LoRA.

    If a batch is cut into parts, the pairs of its configuration are leaves while the model runs, so that they are
    computed and differentiated once and the gradients of all parts are summed in float32. Nothing here waits for a GPU.

    Args:
        model: the base model; its configuration and pairs are changed.
        lora: provides the pairs.
        passes: configurations of the step and their rows.
        accumulate: number of parts of each batch.

    Returns:
        This process's part of the loss per configuration, nats per token, float64 on the model's device.
    """
    losses = []
    for one in passes:
        model.set_config(one.config)
        parts = one.batch.last.argsort(stable=True).chunk(accumulate)  # rows of similar length grouped
        cut = len(parts) > 1
        pairs = lora.pairs(one.config, torch.float32 if cut else model.dtype)
        whole = [tensor for pair in pairs.values() for tensor in pair]
        leaves = [tensor.detach().requires_grad_() for tensor in whole] if cut else whole
        model.set_pairs(dict(zip(pairs, zip(leaves[::2], leaves[1::2], strict=True), strict=True)))
        part_losses = []
        for rows in parts:
            loss = nn.functional.cross_entropy(*model.predictions(one.batch[rows]), reduction="sum") / one.total
            part_losses.append(loss.detach())
            (loss / len(passes)).backward()  # type: ignore[no-untyped-call]
        losses.append(torch.stack(part_losses).double().sum())
        if cut:
            torch.autograd.backward(whole, [leaf.grad for leaf in leaves])
    return torch.stack(losses)
