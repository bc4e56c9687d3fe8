"""Task "text": language modelling; every token of a block but its first is predicted."""

from collections.abc import Sequence
from typing import Any

from coatrt.data.documents import tokenize_text
from coatrt.data.examples import Examples
from coatrt.data.task_data import TaskData
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
    """Return documents as blocks of tokens; arguments and errors are those of `coatrt.data.documents.tokenize_text`."""
    blocks = tokenize_text(tokenizer, documents, max_length, held_out=held_out, progress=progress)
    return TaskData("text", Examples.of_blocks(blocks.train), Examples.of_blocks(blocks.held_out))
