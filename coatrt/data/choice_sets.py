"""Choice sets: questions with several continuations each, of which one is right; scored by likelihood."""

from dataclasses import dataclass

from torch import Tensor

from coatrt.data.examples import Examples

__all__ = ["ChoiceSets"]


@dataclass(frozen=True, eq=False)
class ChoiceSets:
    """The choices of held-out questions.

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
