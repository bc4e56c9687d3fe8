"""The gradients of a step: the task's loss under each of its configurations, and a teacher beside it."""

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coatrt.config import QuantConfig
from coatrt.examples import IGNORED, Examples
from coatrt.fakequant import FakeQuantModel
from coatrt.train_options import TrainOptions

if TYPE_CHECKING:
    from coatrt.loop import LoraModule

__all__ = ["accumulate_gradients"]


def accumulate_gradients(
    model: FakeQuantModel,
    lora: "LoraModule",
    configs: Sequence[QuantConfig],
    batch: Examples,
    total: int,
    options: TrainOptions,
) -> list[float]:
    """Add to the LoRA's gradients those of the mean over configurations of task loss + distill · divergence.

    The pairs of a configuration are leaves while the model runs, so that they are computed and differentiated once,
    however many parts the batch is cut into.

    Args:
        model: the base; its configuration and pairs are left as they happen to be.
        lora: gives the pairs.
        configs: configurations of the step; for the teacher "top" the one with the most bits comes first.
        batch: this process's rows.
        total: targets of the whole batch, over all processes: sums are divided by it.
        options: distill, teacher, precision, accumulate.

    Returns:
        per configuration this process's part of the task's loss, nats per token.
    """
    parts = list(zip(batch.tokens.chunk(options.accumulate), batch.targets.chunk(options.accumulate), strict=True))
    teachers: list[Tensor] | None = None
    if options.distill and options.teacher == "base":
        teachers = _base_predictions(model, parts, options)
    losses = []
    for config in configs:
        model.set_config(config)
        pairs = lora.pairs(config)
        leaves = {name: (a.detach().requires_grad_(), b.detach().requires_grad_()) for name, (a, b) in pairs.items()}
        model.set_pairs(leaves)
        sum_of_losses, predictions = 0.0, []
        for i, (part, goal) in enumerate(parts):
            with _autocast(model, options):
                logits, goals = _predicted(model.logits(part), goal)
            loss = nn.functional.cross_entropy(logits.float(), goals, reduction="sum") / total
            sum_of_losses += loss.item()
            if teachers is not None:
                divergence = nn.functional.kl_div(
                    logits.float().log_softmax(-1), teachers[i], reduction="sum", log_target=True
                )
                loss = loss + options.distill * divergence / total
            elif options.distill:
                predictions.append(logits.detach().float().log_softmax(-1))
            (loss / len(configs)).backward()  # type: ignore[no-untyped-call]
        if predictions:
            teachers = predictions
        losses.append(sum_of_losses)
        made, grown = zip(
            *((whole, leaf) for name in pairs for whole, leaf in zip(pairs[name], leaves[name], strict=True)),
            strict=True,
        )
        torch.autograd.backward(made, [leaf.grad for leaf in grown])
    return losses


def _autocast(model: FakeQuantModel, options: TrainOptions) -> Any:
    if options.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(model.compute.type, torch.bfloat16)


def _predicted(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits [P, V] that predict a target, and the targets [P]."""
    goals = targets[:, 1:].reshape(-1).to(logits.device)
    wanted = goals != IGNORED
    return logits[:, :-1].reshape(-1, logits.shape[-1])[wanted], goals[wanted]


@torch.no_grad()
def _base_predictions(
    model: FakeQuantModel, parts: Sequence[tuple[Tensor, Tensor]], options: TrainOptions
) -> list[Tensor]:
    """Return the log-probabilities of the full-precision model without adapter, [P, V] a part."""
    model.set_config(None)
    model.set_pairs(None)
    made = []
    for part, goal in parts:
        with _autocast(model, options):
            logits, _ = _predicted(model.logits(part), goal)
        made.append(logits.float().log_softmax(-1))
    return made
