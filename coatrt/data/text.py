"""Task "text": language modelling; documents become blocks, and all tokens of a block but the first are predicted.

A block begins with the tokenizer's start token where it has one, as a prompt does: some models, such as Gemma, compute
nothing useful without it.
"""

from collections.abc import Sequence
from typing import Any

import torch

from coatrt.data.documents import token_ids
from coatrt.data.encoding import encode
from coatrt.data.examples import Examples
from coatrt.data.jsonl import split
from coatrt.data.task_data import TaskData
from coatrt.errors import ConfigError
from coatrt.system.progress import Progress, silent

__all__ = ["text_task"]


def text_task(
    tokenizer: Any,
    documents: Sequence[str],
    max_length: int,
    *,
    held_out: Sequence[str] | None = None,
    progress: Progress = silent,
) -> TaskData:
    """Return documents as blocks of tokens; held-out documents are not trained on.

    Args:
        tokenizer: a transformers tokenizer; its end token closes each document.
        documents: texts.
        max_length: tokens per block, at least 2.
        held_out: documents to measure on; by default every tenth document, or, of fewer than ten documents, the last
            tenth of the blocks.
        progress: called while documents are tokenized.

    Raises:
        ConfigError: no block to train on, or none to measure on.
    """
    if held_out is None and len(documents) >= 10:
        documents, held_out = split(documents)
    train = _blocks(tokenizer, documents, max_length, progress)
    if held_out is not None:
        test = _blocks(tokenizer, held_out, max_length, progress)
    else:
        cut = len(train) - max(1, len(train) // 10) if len(train) > 1 else 0
        train, test = train[:cut], train[cut:]
    if not len(train) or not len(test):
        raise ConfigError(
            f"the text has {len(train)} blocks of {max_length} tokens to train on and {len(test)} to measure on; "
            "give more text or a smaller --max-length"
        )
    return TaskData("text", Examples.of_blocks(train), Examples.of_blocks(test))


def _blocks(tokenizer: Any, documents: Sequence[str], length: int, progress: Progress) -> torch.Tensor:
    """Return the tokens of documents, int64 [blocks, length]; an incomplete last block is dropped."""
    end, start = tokenizer.eos_token_id, _start(tokenizer)
    stream: list[int] = []
    for ids in token_ids(tokenizer, documents, progress):
        stream += ids
        if end is not None:
            stream.append(int(end))
    width = length - len(start)
    count = len(stream) // width
    blocks = torch.tensor(stream[: count * width], dtype=torch.int64).view(count, width)
    return torch.cat([torch.tensor(start, dtype=torch.int64).expand(count, -1), blocks], 1)


def _start(tokenizer: Any) -> list[int]:
    """Return the token that the tokenizer puts before a text, if there is one."""
    (plain,), (marked,) = (encode(tokenizer, ["a"], special_tokens=special) for special in (False, True))
    return marked[:1] if len(marked) > len(plain) and marked[:1] != plain[:1] else []
