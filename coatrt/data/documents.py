"""Training text: files → documents → token blocks, with documents held out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coatrt.errors import ConfigError
from coatrt.system.progress import Progress, silent

__all__ = ["TextData", "batches", "read_documents", "token_ids", "tokenize_text"]

_PIECE = 64  # texts that are tokenized between two calls of progress


@dataclass(frozen=True)
class TextData:
    """Token blocks of a text.

    Args:
        train: int64 [blocks, length].
        held_out: int64 [blocks, length]; no document of it is in `train`.
    """

    train: Tensor
    held_out: Tensor


def read_documents(sources: Iterable[str | Path]) -> list[str]:
    """Return the texts of files, and of all `*.txt` files of directories in the order of their names.

    Raises:
        ConfigError: a source is missing, is no UTF-8 text, or there is nothing in it.
    """
    texts = []
    for source in map(Path, sources):
        if not source.exists():
            raise ConfigError(f"text {source} does not exist; give UTF-8 text files or directories of *.txt")
        for path in sorted(source.rglob("*.txt")) if source.is_dir() else [source]:
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError) as error:
                raise ConfigError(f"text {path} cannot be read ({error}); give UTF-8 text files") from None
            if text.strip():
                texts.append(text)
    if not texts:
        raise ConfigError(f"no text in {', '.join(map(str, sources))}; give UTF-8 text files or directories of *.txt")
    return texts


def token_ids(
    tokenizer: Any, texts: Sequence[str], progress: Progress = silent, *, special_tokens: bool = False
) -> list[list[int]]:
    """Return the token ids of each text.

    Args:
        tokenizer: a transformers tokenizer.
        texts: what to tokenize.
        progress: called after every 64 texts.
        special_tokens: whether the tokenizer adds its own, such as one for the start.
    """
    rows: list[list[int]] = []
    for start in range(0, len(texts), _PIECE):
        piece = list(texts[start : start + _PIECE])
        rows += tokenizer(piece, add_special_tokens=special_tokens, verbose=False)["input_ids"]
        progress(len(rows), len(texts), "tokenizing")
    return rows


def _blocks(tokenizer: Any, documents: Sequence[str], length: int, progress: Progress) -> Tensor:
    end = tokenizer.eos_token_id
    stream: list[int] = []
    for ids in token_ids(tokenizer, documents, progress):
        stream += ids
        if end is not None:
            stream.append(int(end))
    count = len(stream) // length
    return torch.tensor(stream[: count * length], dtype=torch.int64).view(count, length)


def tokenize_text(
    tokenizer: Any,
    documents: Sequence[str],
    max_length: int,
    *,
    held_out: Sequence[str] | None = None,
    progress: Progress = silent,
) -> TextData:
    """Cut documents into blocks of tokens.

    Args:
        tokenizer: a transformers tokenizer; its end token closes each document.
        documents: texts.
        max_length: tokens per block.
        held_out: documents to measure on; by default every tenth document, or, where there are fewer than ten, the last
            tenth of the blocks.
        progress: called as documents are tokenized.

    Raises:
        ConfigError: not one block for training, or none to measure on.
    """
    if max_length < 2:
        raise ConfigError(f"max length must be at least 2 tokens, got {max_length}")
    if held_out is None and len(documents) >= 10:
        documents, held_out = [text for i, text in enumerate(documents) if i % 10], documents[::10]
    train = _blocks(tokenizer, documents, max_length, progress)
    if held_out is not None:
        test = _blocks(tokenizer, held_out, max_length, progress)
    else:
        cut = len(train) - max(1, len(train) // 10) if len(train) > 1 else 0
        train, test = train[:cut], train[cut:]
    if not len(train) or not len(test):
        raise ConfigError(
            f"the text has {len(train)} blocks of {max_length} tokens to train on and {len(test)} to measure on; "
            "give more text or a smaller max length"
        )
    return TextData(train, test)


def batches(count: int, size: int, step: int, seed: int) -> Tensor:
    """Return which of `count` blocks make up the batch of a step: every block once per epoch, in shuffled order.

    A function of its arguments alone, so that a resumed run sees the same batches.

    Returns:
        int64 [size].
    """
    rows: list[int] = []
    position = step * size
    while len(rows) < size:
        epoch, offset = divmod(position, count)
        generator = torch.Generator().manual_seed((seed << 20) + epoch)
        rows += torch.randperm(count, generator=generator)[offset : offset + size - len(rows)].tolist()
        position = step * size + len(rows)
    return torch.tensor(rows)
