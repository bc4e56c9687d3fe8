"""Training text: files → documents → token blocks, with documents held out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coatrt.errors import ConfigError

__all__ = ["TextData", "batches", "read_documents", "tokenize_text"]


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


def _blocks(tokenizer: Any, documents: Sequence[str], length: int) -> Tensor:
    end = tokenizer.eos_token_id
    stream: list[int] = []
    for ids in tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]:
        stream += ids
        if end is not None:
            stream.append(int(end))
    count = len(stream) // length
    return torch.tensor(stream[: count * length], dtype=torch.int64).view(count, length)


def tokenize_text(
    tokenizer: Any, documents: Sequence[str], length: int, *, held_out: Sequence[str] | None = None, every: int = 10
) -> TextData:
    """Cut documents into blocks of tokens.

    Args:
        tokenizer: a transformers tokenizer; its end token closes each document.
        documents: texts.
        length: tokens per block.
        held_out: documents to measure on; by default every tenth document, or, where there are fewer than ten, the last
            tenth of the blocks.
        every: one document in so many is held out.

    Raises:
        ConfigError: not one block for training, or none to measure on.
    """
    if length < 2:
        raise ConfigError(f"blocks of {length} tokens are given; give at least 2, such as 128")
    if held_out is not None:
        train, test = _blocks(tokenizer, documents, length), _blocks(tokenizer, held_out, length)
    elif len(documents) >= every:
        train = _blocks(tokenizer, [text for i, text in enumerate(documents) if i % every], length)
        test = _blocks(tokenizer, documents[::every], length)
    else:
        blocks = _blocks(tokenizer, documents, length)
        cut = len(blocks) - max(1, len(blocks) // every) if len(blocks) > 1 else 0
        train, test = blocks[:cut], blocks[cut:]
    if not len(train) or not len(test):
        raise ConfigError(
            f"the text gives {len(train)} blocks of {length} tokens to train on and {len(test)} to measure on; "
            "give more text or shorter blocks"
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
