"""Texts from files, their tokens, and the batches of training."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coatrt.data.encoding import encode
from coatrt.errors import ConfigError
from coatrt.system.progress import Progress, silent
from coatrt.system.utf8 import decode

__all__ = ["batches", "read_documents", "read_files", "token_ids"]

_PIECE = 64  # texts tokenized between two calls of progress


def read_files(sources: Sequence[str | Path], suffix: str, what: str) -> Iterator[tuple[Path, str]]:
    """Yield path and text of files, and of all files with a suffix in directories, ordered by name.

    A byte order mark in front is dropped; CRLF and CR become LF.

    Args:
        sources: files and directories.
        suffix: suffix of files in directories, such as ".txt".
        what: kind of files, for messages ("UTF-8 text").

    Raises:
        ConfigError: a source is missing, or a line is not UTF-8.
    """
    for source in map(Path, sources):
        if not source.exists():
            raise ConfigError(f"data {source} does not exist; give {what} files or directories of *{suffix}")
        for path in sorted(source.rglob(f"*{suffix}")) if source.is_dir() else [source]:
            try:
                text = decode(path.read_bytes(), f"data {path}")
            except OSError as error:
                raise ConfigError(f"data {path} cannot be read ({error}); give {what} files") from None
            text = text.replace("\r\n", "\n").replace("\r", "\n")
            if "\0" in text:
                line = 1 + text[: text.index("\0")].count("\n")
                raise ConfigError(f"data {path} line {line} holds a NUL character; give {what} files")
            yield path, text


def read_documents(sources: Sequence[str | Path]) -> list[str]:
    """Return the texts of files, and of all `*.txt` files in directories, ordered by name.

    Raises:
        ConfigError: a source is missing or not UTF-8, or all of them are empty.
    """
    texts = [text for _, text in read_files(sources, ".txt", "UTF-8 text") if text.strip()]
    if not texts:
        raise ConfigError(f"no text in {', '.join(map(str, sources))}; give UTF-8 text files or directories of *.txt")
    return texts


def token_ids(
    tokenizer: Any, texts: Sequence[str], progress: Progress = silent, *, special_tokens: bool = False
) -> list[list[int]]:
    """Return the token ids of each text.

    Args:
        tokenizer: a transformers tokenizer.
        texts: texts to tokenize.
        progress: called after every 64 texts.
        special_tokens: whether to add the tokenizer's special tokens, such as a start token.
    """
    rows: list[list[int]] = []
    for start in range(0, len(texts), _PIECE):
        rows += encode(tokenizer, texts[start : start + _PIECE], special_tokens=special_tokens)
        progress(len(rows), len(texts), "tokenizing")
    return rows


def batches(count: int, size: int, step: int, seed: int) -> Tensor:
    """Return the indices of the examples in the batch of a step: each of `count` once per epoch, in shuffled order.

    It depends on its arguments alone, so a resumed run sees the same batches.

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
