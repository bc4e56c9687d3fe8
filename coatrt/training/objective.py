"""The gradients of a step: the task's loss under each of its configurations."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from coatrt.configs.config import QuantConfig
from coatrt.data.examples import IGNORED, Examples
from coatrt.evaluation.fake_quant import FakeQuantModel

__all__ = ["LoraModule", "Pass", "accumulate_gradients"]


class LoraModule(Protocol):
    """What the loop trains: a module that gives each matrix its pair for a configuration."""

    def pairs(self, config: QuantConfig) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Return matrix name → (A [K, r], scaled B [r, N])."""

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
) -> list[float]:
    """Add to the LoRA's gradients those of the mean loss over configurations.

    The pairs of a configuration are leaves while the model runs, so that they are computed and differentiated once,
    however many parts the batch is cut into.

    Args:
        model: the base; its configuration and pairs are left as they happen to be.
        lora: gives the pairs.
        passes: configurations of the step and their rows.
        accumulate: parts each batch is cut into.

    Returns:
        per configuration this process's part of the task's loss, nats per token.
    """
    losses = []
    for one in passes:
        model.set_config(one.config)
        pairs = lora.pairs(one.config)
        leaves = {name: (a.detach().requires_grad_(), b.detach().requires_grad_()) for name, (a, b) in pairs.items()}
        model.set_pairs(leaves)
        sum_of_losses = 0.0
        for rows in one.batch.last.argsort(stable=True).chunk(accumulate):  # rows of similar length grouped
            logits, targets = model.predictions(one.batch[rows])
            logits, targets = logits.flatten(0, 1), targets.flatten()
            marked = targets != IGNORED
            if not bool(marked.all()):  # a copy of the logits that plain text does without
                logits, targets = logits[marked], targets[marked]
            loss = nn.functional.cross_entropy(logits.float(), targets, reduction="sum") / one.total
            sum_of_losses += loss.item()
            (loss / len(passes)).backward()  # type: ignore[no-untyped-call]
        losses.append(sum_of_losses)
        whole = [tensor for pair in pairs.values() for tensor in pair]
        torch.autograd.backward(whole, [leaf.grad for name in pairs for leaf in leaves[name]])
    return losses
