"""The data of a task: examples to train on, held-out ones, and what is measured on them."""

import hashlib
from dataclasses import dataclass
from typing import Literal

from coatrt.data.choice_sets import ChoiceSets
from coatrt.data.examples import Examples

__all__ = ["TaskData", "TaskKind"]

TaskKind = Literal["text", "chat", "choice"]


@dataclass(frozen=True, eq=False)
class TaskData:
    """What a training reads and is measured on.

    Args:
        kind: "text", "chat" or "choice".
        train: examples to train on, at least one.
        held_out: examples to measure the loss on, at least one; none of them is trained on.
        choices: choice tasks: the held-out questions, in the order of `held_out`.
        dropped: lines left out because they are longer than the rows.
    """

    kind: TaskKind
    train: Examples
    held_out: Examples
    choices: ChoiceSets | None = None
    dropped: int = 0

    @property
    def digest(self) -> str:
        """SHA-256 over everything that training and measuring read, as 64 hexadecimal digits."""
        parts = [self.kind, self.train.digest, self.held_out.digest]
        if self.choices is not None:
            parts += [self.choices.rows.digest, str(self.choices.owner.tolist()), str(self.choices.answers.tolist())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
