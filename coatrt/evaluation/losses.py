"""Held-out numbers of a model as it stands: whoever asks has set its configuration and bound its LoRA."""

import torch
from torch import Tensor

from coatrt.data.examples import IGNORED, Examples
from coatrt.data.task_data import ChoiceSets, TaskData
from coatrt.evaluation.fake_quant import FakeQuantModel

__all__ = ["choice_scores", "example_losses", "log_likelihoods", "mean_loss", "measure_held_out"]

_ROWS = 8  # in one forward pass
_DISTINCT_ROWS = 16  # in one forward pass, where only a few places need logits


@torch.no_grad()
def mean_loss(model: FakeQuantModel, examples: Examples) -> float:
    """Return the mean cross-entropy over all targets in nats; its exponential is the perplexity.

    How many rows are computed at once changes no number, whatever their targets.
    """
    total = 0.0
    for start in range(0, len(examples), _ROWS):
        piece = examples[start : start + _ROWS]
        total += model.loss(piece).item() * piece.predicted
    return total / examples.predicted


@torch.no_grad()
def log_likelihoods(model: FakeQuantModel, examples: Examples) -> Tensor:
    """Return the sum of the log-probabilities of each row's targets, in nats, float64 [n].

    What a row's score depends on is the tokens before its last target. Rows that share them, such as the choices of one
    question where each is a single token, are computed once; the score is the same number.
    """
    last = examples.last
    places = torch.arange(examples.tokens.shape[1])
    seen = examples.tokens.masked_fill(places >= last[:, None], 0)
    distinct, member = torch.unique(seen, dim=0, return_inverse=True)
    length = torch.zeros(len(distinct), dtype=torch.int64).scatter_reduce(0, member, last, "amax")
    order = length.argsort(stable=True)  # rows of similar length grouped: little padding
    scores = torch.zeros(len(examples), dtype=torch.float64)
    targets = examples.targets[:, 1:]  # column j is predicted at place j
    for start in range(0, len(order), _DISTINCT_ROWS):
        piece = order[start : start + _DISTINCT_ROWS]
        rows = torch.isin(member, piece).nonzero().squeeze(1)
        wanted = targets[rows] != IGNORED
        columns = wanted.any(0).nonzero().squeeze(1)
        logits = model.logits(distinct[piece, : int(length[piece].max())], columns).float()
        row, column = wanted[:, columns].nonzero(as_tuple=True)
        slot = torch.zeros(len(distinct), dtype=torch.int64)
        slot[piece] = torch.arange(len(piece))
        at, token = slot[member[rows[row]]], targets[rows[row], columns[column]]
        at, token, column = (index.to(logits.device) for index in (at, token, column))
        found = logits[at, column, token] - logits.logsumexp(-1)[at, column]
        scores.index_add_(0, rows[row], found.double().cpu())
    return scores


def example_losses(model: FakeQuantModel, examples: Examples) -> Tensor:
    """Return the mean cross-entropy over the targets of each row, in nats, float64 [n]."""
    return -log_likelihoods(model, examples) / examples.counts


@torch.no_grad()
def choice_scores(model: FakeQuantModel, choices: ChoiceSets) -> dict[str, float]:
    """Return {"loss": …, "accuracy": …} over questions.

    The loss is the mean cross-entropy in nats over the tokens of the right choices, the accuracy the share of
    questions whose right choice scores highest (the first of equal ones counts).
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

    Measured on the first `limit` held-out examples (questions); None: on all of them.
    """
    if data.choices is not None:
        return choice_scores(model, data.choices if limit is None else data.choices.first(limit))
    return {"loss": mean_loss(model, data.held_out[:limit])}
