"""Held-out losses and accuracy of a model; the caller has set its configuration and LoRA."""

import torch
from torch import Tensor

from coatrt.data.examples import IGNORED, Examples
from coatrt.data.task_data import ChoiceSets, TaskData
from coatrt.evaluation.fake_quant import FakeQuantModel

__all__ = ["choice_scores", "example_losses", "log_likelihoods", "mean_loss", "measure_held_out"]

_ROWS = 8  # in one forward pass
_DISTINCT_ROWS = 16  # in one forward pass, if only a few positions need logits


@torch.no_grad()
def mean_loss(model: FakeQuantModel, examples: Examples) -> float:
    """Return the mean cross-entropy over all targets, in nats; its exponential is the perplexity.

    The result does not depend on the number of rows per forward pass.
    """
    total = 0.0
    for start in range(0, len(examples), _ROWS):
        piece = examples[start : start + _ROWS]
        total += model.loss(piece).item() * piece.target_count
    return total / examples.target_count


@torch.no_grad()
def log_likelihoods(model: FakeQuantModel, examples: Examples) -> Tensor:
    """Return the sum of log-probabilities of each row's targets, in nats, float64 [n].

    A row's score depends on the tokens before its last target. Rows that share these tokens, such as single-token
    choices of a question, are computed once; the score is the same.
    """
    last = examples.last
    places = torch.arange(examples.tokens.shape[1])
    inputs = examples.tokens.masked_fill(places >= last[:, None], 0)
    distinct, member = torch.unique(inputs, dim=0, return_inverse=True)
    length = torch.zeros(len(distinct), dtype=torch.int64).scatter_reduce(0, member, last, "amax")
    order = length.argsort(stable=True)  # rows of similar length grouped: little padding
    scores = torch.zeros(len(examples), dtype=torch.float64)
    targets = examples.targets[:, 1:]  # column j is predicted at position j
    for start in range(0, len(order), _DISTINCT_ROWS):
        piece = order[start : start + _DISTINCT_ROWS]
        rows = torch.isin(member, piece).nonzero().squeeze(1)
        is_target = targets[rows] != IGNORED
        columns = is_target.any(0).nonzero().squeeze(1)
        logits = model.logits(distinct[piece, : int(length[piece].max())], columns).float()
        row, column = is_target[:, columns].nonzero(as_tuple=True)
        slot = torch.zeros(len(distinct), dtype=torch.int64)
        slot[piece] = torch.arange(len(piece))
        at, token = slot[member[rows[row]]], targets[rows[row], columns[column]]
        at, token, column = (index.to(logits.device) for index in (at, token, column))
        log_probabilities = logits[at, column, token] - logits.logsumexp(-1)[at, column]
        scores.index_add_(0, rows[row], log_probabilities.double().cpu())
    return scores


def example_losses(model: FakeQuantModel, examples: Examples) -> Tensor:
    """Return the mean cross-entropy over the targets of each row, in nats, float64 [n]."""
    return -log_likelihoods(model, examples) / examples.counts


@torch.no_grad()
def choice_scores(model: FakeQuantModel, choices: ChoiceSets) -> dict[str, float]:
    """Return {"loss": …, "accuracy": …} over questions.

    The loss is the mean cross-entropy over the tokens of the right choices, in nats. The accuracy is the share of
    questions whose right choice scores highest; of equal scores the first counts.
    """
    scores = log_likelihoods(model, choices.rows)
    starts = choices.starts
    table = torch.full((len(choices), int(choices.owner.bincount().max())), -torch.inf, dtype=torch.float64)
    table[choices.owner, torch.arange(len(scores)) - starts[choices.owner]] = scores
    right = starts + choices.answers
    loss = -float(scores[right].sum()) / int(choices.rows.counts[right].sum())
    return {"loss": loss, "accuracy": float((table.argmax(1) == choices.answers).double().mean())}


def measure_held_out(model: FakeQuantModel, data: TaskData, limit: int | None = None) -> dict[str, float]:
    """Return {"loss": mean cross-entropy in nats per target}, and for choice tasks "accuracy" (share of questions).

    Only the first `limit` held-out examples (questions) are used; None: all.
    """
    if data.choices is not None:
        return choice_scores(model, data.choices if limit is None else data.choices.first(limit))
    return {"loss": mean_loss(model, data.held_out[:limit])}
