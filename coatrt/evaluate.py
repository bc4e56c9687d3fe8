"""Held-out loss of a model as it stands: configuration set, LoRA bound."""

import torch
from torch import Tensor

from coatrt.fakequant import FakeQuantModel

__all__ = ["mean_loss"]


@torch.no_grad()
def mean_loss(model: FakeQuantModel, blocks: Tensor, batch: int = 8) -> float:
    """Return the mean next-token cross-entropy in nats; its exponential is the perplexity.

    Args:
        model: configuration and LoRA already set.
        blocks: token ids [blocks, length]; the first token of each block is not predicted.
        batch: blocks at once.
    """
    total = 0.0
    for start in range(0, len(blocks), batch):
        piece = blocks[start : start + batch]
        total += model.loss(piece).item() * len(piece)
    return total / len(blocks)
