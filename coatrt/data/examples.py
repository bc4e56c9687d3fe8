"""Examples: rows of tokens with marked targets, for training and held-out losses."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from coatrt.errors import ConfigError
from coatrt.system.tensors import hash_tensors

__all__ = ["IGNORED", "Examples"]

IGNORED = -100
"""Target of a token that is not predicted; torch's cross-entropy ignores it."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Rows of tokens, those to predict marked as targets.

    Shorter rows are padded on the right. Attention is causal and padding is never a target, so no attention mask is
    needed: a padded row has the logits of the row alone.

    Args:
        tokens: int64 [n, S]; padding is any token id.
        targets: int64 [n, S]; the token itself where it is to be predicted from those before it, else `IGNORED`.

    Raises:
        ConfigError: shapes or dtypes differ, a target is not its token, a first token is a target, or a row has none.
    """

    tokens: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.tokens.shape)
        if len(shape) != 2 or tuple(self.targets.shape) != shape:
            raise ConfigError(
                f"tokens and targets must have the same shape [rows, length], got {list(shape)} and "
                f"{list(self.targets.shape)}"
            )
        if self.tokens.dtype != torch.int64 or self.targets.dtype != torch.int64:
            raise ConfigError(f"tokens and targets must be int64, got {self.tokens.dtype} and {self.targets.dtype}")
        is_target = self.targets != IGNORED
        if bool((is_target & (self.targets != self.tokens)).any()):
            raise ConfigError(f"a target must be its token or {IGNORED}")
        if bool(is_target[:, :1].any()):
            raise ConfigError("the first token of a row cannot be a target: no token comes before it")
        if not bool(is_target.any(1).all()):
            raise ConfigError("a row has no target; remove the row")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | Tensor) -> "Examples":
        """Return some rows: a slice, or int64 or bool [rows]."""
        return Examples(self.tokens[rows], self.targets[rows])

    @classmethod
    def of_blocks(cls, blocks: Tensor) -> "Examples":
        """Return blocks of text, int64 [n, S], as examples: every token but the first of each block is a target."""
        targets = blocks.clone()
        targets[:, :1] = IGNORED
        return cls(blocks, targets)

    @classmethod
    def of_rows(cls, rows: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> "Examples":
        """Return rows of unequal lengths as examples, padded on the right with zeros.

        Args:
            rows: token ids of each row and, for each token, whether it is a target.
        """
        tokens = pad_sequence([torch.tensor(ids) for ids, _ in rows], batch_first=True)
        marks = pad_sequence([torch.tensor(marks) for _, marks in rows], batch_first=True)
        return cls(tokens, tokens.masked_fill(~marks, IGNORED))

    @property
    def counts(self) -> Tensor:
        """Number of targets in each row, int64 [n]."""
        return (self.targets != IGNORED).sum(1)

    @property
    def target_count(self) -> int:
        """Number of targets in all rows."""
        return int(self.counts.sum())

    @property
    def last(self) -> Tensor:
        """Column of each row's last target, int64 [n]; no loss depends on a token after it."""
        places = torch.arange(self.tokens.shape[1])
        return torch.where(self.targets != IGNORED, places, -1).amax(1)

    def trimmed(self) -> "Examples":
        """Return the rows cut after the last column with a target: the same losses for less work."""
        width = int(self.last.max()) + 1
        return self if width == self.tokens.shape[1] else Examples(self.tokens[:, :width], self.targets[:, :width])

    @property
    def digest(self) -> str:
        """SHA-256 of shape, tokens and targets as 64 hexadecimal digits."""
        return hash_tensors({"tokens": self.tokens, "targets": self.targets})
