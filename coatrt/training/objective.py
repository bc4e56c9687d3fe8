"""The gradients of a step: the task's loss under each of its configurations."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from coatrt.configs.config import QuantConfig
from coatrt.data.examples import Examples
from coatrt.evaluation.fake_quant import FakeQuantModel

__all__ = ["LoraModule", "Pass", "accumulate_gradients"]


class LoraModule(Protocol):
    """What the loop trains: a module that gives each matrix its pair for a configuration."""

    def pairs(self, config: QuantConfig, dtype: torch.dtype = torch.float32) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Return matrix name → (A [K, r], scaled B [r, N]), computed in float32 and then cast."""

    def parameter_groups(self) -> Mapping[str, list[nn.Parameter]]:
        """Return the parameters that learn, by the name of their rate (`TrainOptions.rates`)."""

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Return every parameter by name."""


@dataclass(frozen=True)
class Pass:
    """What one configuration of a step is trained on.

    Args:
        config: the configuration.
        batch: this process's rows.
        total: targets of the whole batch, over all processes: sums are divided by it.
    """

    config: QuantConfig
    batch: Examples
    total: int


def accumulate_gradients(
    model: FakeQuantModel, lora: LoraModule, passes: Sequence[Pass], accumulate: int = 1
) -> Tensor:
    """Add to the LoRA's gradients those of the mean loss over configurations.

    Where a batch is cut into parts, the pairs of its configuration are leaves while the model runs, so that they are
    computed and differentiated once, and the gradients of all parts are summed in float32. On a GPU nothing here waits
    for what it computes.

    Args:
        model: the base; its configuration and pairs are left as they happen to be.
        lora: gives the pairs.
        passes: configurations of the step and their rows.
        accumulate: parts each batch is cut into.

    Returns:
        per configuration this process's part of the task's loss, nats per token, float64 on the model's device.
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
        found = []
        for rows in parts:
            loss = nn.functional.cross_entropy(*model.predictions(one.batch[rows]), reduction="sum") / one.total
            found.append(loss.detach())
            (loss / len(passes)).backward()  # type: ignore[no-untyped-call]
        losses.append(torch.stack(found).double().sum())
        if cut:
            torch.autograd.backward(whole, [leaf.grad for leaf in leaves])
    return torch.stack(losses)
