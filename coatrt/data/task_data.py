"""The data of a task: examples to train on and held-out examples."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from coatrt.data.examples import Examples
from coatrt.errors import ConfigError

__all__ = ["ChoiceSets", "TaskData", "TaskKind"]

TaskKind = Literal["text", "chat", "choice"]


@dataclass(frozen=True, eq=False)
class ChoiceSets:
    """Held-out questions: several choices each, one of them right.

    A choice's score is the sum of the log-probabilities of its tokens given the prompt, the log-probability that the
    model writes this choice. It is not divided by the number of tokens: training on the right choice raises this sum,
    and a mean would favour long words, whose last tokens are certain once the first are written.

    Args:
        rows: one example per choice, question by question.
        owner: int64 [rows], index of each row's question, from 0 without gaps.
        answers: int64 [questions], index of the right choice among those of the question.
    """

    rows: Examples
    owner: Tensor
    answers: Tensor

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def starts(self) -> Tensor:
        """First row of each question, int64 [questions]."""
        sizes = self.owner.bincount(minlength=len(self))
        return sizes.cumsum(0) - sizes

    def first(self, count: int) -> "ChoiceSets":
        """Return the first `count` questions."""
        rows = int((self.owner < count).sum())
        return ChoiceSets(self.rows[:rows], self.owner[:rows], self.answers[:count])


@dataclass(frozen=True, eq=False)
class TaskData:
    """Examples for training and measuring.

    Args:
        kind: "text", "chat" or "choice".
        train: examples to train on, at least one.
        held_out: examples to measure the loss on, at least one; none of them is trained on.
        choices: the held-out questions of a choice task, in the order of `held_out`.
        dropped: number of lines dropped because they are longer than the rows.
        added_tokens: id → text of tokens added to the tokenizer, for messages.
    """

    kind: TaskKind
    train: Examples
    held_out: Examples
    choices: ChoiceSets | None = None
    dropped: int = 0
    added_tokens: Mapping[int, str] = field(default_factory=dict)

    def check_rows(self, rows: int) -> None:
        """Refuse tokens without a row in the model's embedding.

        Args:
            rows: number of rows of the embedding.

        Raises:
            ConfigError: the data contain such a token.
        """
        parts = [self.train, self.held_out, *([self.choices.rows] if self.choices is not None else [])]
        largest = max(int(part.tokens.max()) for part in parts if part.tokens.numel())
        if largest >= rows:
            text = f" {self.added_tokens[largest]!r}" if largest in self.added_tokens else ""
            raise ConfigError(
                f"the data contain token {largest}{text}, the model's embedding has {rows} rows; resize the embedding "
                "to the tokenizer and save the model again, or remove that text from the data"
            )

    @property
    def digest(self) -> str:
        """SHA-256 over all examples and choices, 64 hexadecimal digits."""
        parts = [self.kind, self.train.digest, self.held_out.digest]
        if self.choices is not None:
            parts += [self.choices.rows.digest, str(self.choices.owner.tolist()), str(self.choices.answers.tolist())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
