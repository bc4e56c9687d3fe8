"""The gradients of a step: the task's loss under each of its configurations, and a teacher beside it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coatrt.configs.config import QuantConfig
from coatrt.data.examples import IGNORED, Examples
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.training.options import TrainOptions
from coatrt.training.protocols import LoraModule

__all__ = ["Pass", "accumulate_gradients"]


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
    model: FakeQuantModel, lora: LoraModule, passes: Sequence[Pass], options: TrainOptions
) -> list[float]:
    """Add to the LoRA's gradients those of the mean over configurations of task loss + distill · divergence.

    The pairs of a configuration are leaves while the model runs, so that they are computed and differentiated once,
    however many parts the batch is cut into.

    Args:
        model: the base; its configuration and pairs are left as they happen to be.
        lora: gives the pairs.
        passes: configurations of the step and their rows; with a teacher all have the same rows, and for the teacher
            "top" the configuration with the most bits comes first.
        options: distill, teacher, accumulate.

    Returns:
        per configuration this process's part of the task's loss, nats per token.
    """
    teachers: list[Tensor] | None = None
    if options.distill and options.teacher == "base":
        teachers = _base_predictions(model, _parts(passes[0].batch, options))
    losses = []
    for one in passes:
        model.set_config(one.config)
        pairs = lora.pairs(one.config)
        leaves = {name: (a.detach().requires_grad_(), b.detach().requires_grad_()) for name, (a, b) in pairs.items()}
        model.set_pairs(leaves)
        sum_of_losses, predictions = 0.0, []
        for i, part in enumerate(_parts(one.batch, options)):
            logits, goals = _predicted(model, part)
            loss = nn.functional.cross_entropy(logits, goals, reduction="sum") / one.total
            sum_of_losses += loss.item()
            if teachers is not None:
                divergence = nn.functional.kl_div(logits.log_softmax(-1), teachers[i], reduction="sum", log_target=True)
                loss = loss + options.distill * divergence / one.total
            elif options.distill:
                predictions.append(logits.detach().log_softmax(-1))
            (loss / len(passes)).backward()  # type: ignore[no-untyped-call]
        if predictions:
            teachers = predictions
        losses.append(sum_of_losses)
        made, grown = zip(
            *((whole, leaf) for name in pairs for whole, leaf in zip(pairs[name], leaves[name], strict=True)),
            strict=True,
        )
        torch.autograd.backward(made, [leaf.grad for leaf in grown])
    return losses


def _parts(batch: Examples, options: TrainOptions) -> list[Examples]:
    """Return the parts of a batch that pass through the model one after the other: rows of like length together."""
    return [batch[rows] for rows in batch.last.argsort(stable=True).chunk(options.accumulate)]


def _predicted(model: FakeQuantModel, part: Examples) -> tuple[Tensor, Tensor]:
    """Return float32 logits [P, V] of the positions that predict a target, and the targets [P]."""
    logits, goals = model.predictions(part)
    logits, goals = logits.reshape(-1, logits.shape[-1]), goals.reshape(-1)
    wanted = goals != IGNORED
    if not bool(wanted.all()):  # a copy of the logits that plain text does without
        logits, goals = logits[wanted], goals[wanted]
    return logits.float(), goals


@torch.no_grad()
def _base_predictions(model: FakeQuantModel, parts: Sequence[Examples]) -> list[Tensor]:
    """Return the log-probabilities of the full-precision model without adapter, [P, V] a part."""
    model.set_config(None)
    model.set_pairs(None)
    return [_predicted(model, part)[0].log_softmax(-1) for part in parts]
