"""The data of a task: examples to train on, held-out ones, and what is measured on them."""

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
    """The choices of held-out questions: several continuations each, of which one is right.

    A choice's score is the sum of the log-probabilities of its tokens given the prompt: the log of the probability that
    the model writes this choice. It is not divided by the number of tokens, because training on the right choice raises
    just this sum, and because a mean would favour long words whose ends are certain once they are begun.

    Args:
        rows: one example per choice, the choices of a question in their order, questions in theirs.
        owner: int64 [rows], the question of each row, counted from 0 without a gap.
        answers: int64 [questions], place of the right choice among the question's.
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
    """What a training reads and is measured on.

    Args:
        kind: "text", "chat" or "choice".
        train: examples to train on, at least one.
        held_out: examples to measure the loss on, at least one; none of them is trained on.
        choices: choice tasks: the held-out questions, in the order of `held_out`.
        dropped: lines left out because they are longer than the rows.
        added: tokens that were added to the tokenizer, by id; for messages.
    """

    kind: TaskKind
    train: Examples
    held_out: Examples
    choices: ChoiceSets | None = None
    dropped: int = 0
    added: Mapping[int, str] = field(default_factory=dict)

    def check_rows(self, rows: int) -> None:
        """Refuse tokens that a model's embedding has no row for.

        Args:
            rows: of the embedding.

        Raises:
            ConfigError: there is such a token.
        """
        parts = [self.train, self.held_out, *([self.choices.rows] if self.choices is not None else [])]
        largest = max(int(part.tokens.max()) for part in parts if part.tokens.numel())
        if largest >= rows:
            named = f" {self.added[largest]!r}" if largest in self.added else ""
            raise ConfigError(
                f"the data hold the token {largest}{named} and the model's embedding has {rows} rows; save the model "
                "with its embedding resized to the tokenizer, or take that text out of the data"
            )

    @property
    def digest(self) -> str:
        """SHA-256 over everything that training and measuring read, as 64 hexadecimal digits."""
        parts = [self.kind, self.train.digest, self.held_out.digest]
        if self.choices is not None:
            parts += [self.choices.rows.digest, str(self.choices.owner.tolist()), str(self.choices.answers.tolist())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
