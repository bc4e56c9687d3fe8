"""The data of a task: examples to train on, held-out ones, and what is measured on them."""

import hashlib
from dataclasses import dataclass
from typing import Literal

from coatrt.errors import ConfigError
from coatrt.evaluate import mean_loss
from coatrt.examples import Examples
from coatrt.fakequant import FakeQuantModel
from coatrt.tasks.choice_sets import ChoiceSets

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

    def measure(self, model: FakeQuantModel, limit: int | None = None) -> dict[str, float]:
        """Return {"loss": mean cross-entropy in nats per target}, and for choice tasks "accuracy" (share of questions).

        Args:
            model: configuration and LoRA already set.
            limit: most held-out examples (questions) to use, the first ones; None: all.
        """
        count = len(self.held_out) if limit is None else min(limit, len(self.held_out))
        if self.choices is not None:
            return self.choices.first(count).measure(model)
        return {"loss": mean_loss(model, self.held_out[:count])}

    @property
    def digest(self) -> str:
        """SHA-256 over everything that training and measuring read, as 64 hexadecimal digits."""
        parts = [self.kind, self.train.digest, self.held_out.digest]
        if self.choices is not None:
            parts += [self.choices.rows.digest, str(self.choices.owner.tolist()), str(self.choices.answers.tolist())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
