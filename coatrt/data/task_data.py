"""The data of a task: examples to train on, held-out ones, and what is measured on them."""

import hashlib
from dataclasses import dataclass
from typing import Literal

from coatrt.data.choice_sets import ChoiceSets
from coatrt.data.examples import Examples
from coatrt.errors import ConfigError

__all__ = ["TaskData", "TaskKind"]

TaskKind = Literal["text", "chat", "choice"]


@dataclass(frozen=True, eq=False)
class TaskData:
    """What a training reads and is measured on.

    Args:
        kind: "text", "chat" or "choice".
        train: examples to train on.
        held_out: examples to measure the loss on; none of them is trained on.
        choices: choice tasks: the held-out questions, in the order of `held_out`.
        dropped: lines left out because they are longer than the rows.

    Raises:
        ConfigError: one of the two is empty, or the choices are of another number of questions.
    """

    kind: TaskKind
    train: Examples
    held_out: Examples
    choices: ChoiceSets | None = None
    dropped: int = 0

    def __post_init__(self) -> None:
        if not len(self.train) or not len(self.held_out):
            raise ConfigError(
                f"{len(self.train)} examples to train on and {len(self.held_out)} to measure on are given; "
                "give more data"
            )
        if self.choices is not None and len(self.choices) != len(self.held_out):
            raise ConfigError(
                f"{len(self.choices)} held-out questions have {len(self.held_out)} examples; give one each"
            )

    @property
    def digest(self) -> str:
        """SHA-256 over everything that training and measuring read, as 64 hexadecimal digits."""
        parts = [self.kind, self.train.digest, self.held_out.digest]
        if self.choices is not None:
            parts += [self.choices.rows.digest, str(self.choices.owner.tolist()), str(self.choices.answers.tolist())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
