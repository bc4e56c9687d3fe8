"""Tasks by name: from files to data."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from coatrt.data.chat import chat_task
from coatrt.data.choice import Question, choice_task
from coatrt.data.conversation import Conversation
from coatrt.data.documents import read_documents
from coatrt.data.jsonl import Line, read_lines, split
from coatrt.data.task_data import TaskData, TaskKind
from coatrt.data.text import text_task
from coatrt.errors import ConfigError
from coatrt.system.progress import Progress, silent

__all__ = ["load_task"]

_MAX_LENGTH = 2**20
Sources = Sequence[str | Path]
T = TypeVar("T")


def _split_lines(sources: Sources, held_out: Sources | None, read: Callable[[Line], T]) -> tuple[list[T], list[T]]:
    items = [read(line) for line in read_lines(sources)]
    if held_out is not None:
        return items, [read(line) for line in read_lines(held_out)]
    if len(items) < 2:
        raise ConfigError(
            f"only one line in {', '.join(map(str, sources))}; give at least two, one of them to measure on"
        )
    return split(items)


def load_task(
    kind: str,
    sources: Sources,
    tokenizer: Any,
    max_length: int,
    *,
    held_out: Sources | None = None,
    progress: Progress = silent,
) -> TaskData:
    """Read the data of a task from files.

    Args:
        kind: "text" (UTF-8 text files), "chat" or "choice" (JSONL, see `Conversation.from_line`, `Question.from_line`).
        sources: files, or directories of *.txt or *.jsonl.
        tokenizer: tokenizer of the model.
        max_length: tokens of a block of text; maximum tokens of a conversation, or of a question with its choice.
        held_out: files to measure on; by default every tenth document or line, see `text_task` and `split`.
        progress: called while texts are tokenized.

    Raises:
        ConfigError: an unknown kind, or a file, a line or a split that cannot be used; the message names file and line.
    """
    if not 2 <= max_length <= _MAX_LENGTH:
        raise ConfigError(f"max length must be at least 2 tokens and at most {_MAX_LENGTH}, got {max_length}")
    if kind == "text":
        documents_held_out = read_documents(held_out) if held_out is not None else None
        task = text_task(tokenizer, read_documents(sources), max_length, held_out=documents_held_out, progress=progress)
    elif kind == "chat":
        task = chat_task(tokenizer, *_split_lines(sources, held_out, Conversation.from_line), max_length, progress)
    elif kind == "choice":
        task = choice_task(tokenizer, *_split_lines(sources, held_out, Question.from_line), max_length, progress)
    else:
        raise ConfigError(f"unknown task {kind!r}; allowed: {', '.join(get_args(TaskKind))}")
    return replace(task, added_tokens={place: token for token, place in tokenizer.get_added_vocab().items()})
