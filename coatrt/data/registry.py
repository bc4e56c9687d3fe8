"""The tasks by name: files → data."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from coatrt.data.chat import Conversation, chat_task
from coatrt.data.choice import Question, choice_task
from coatrt.data.documents import read_documents
from coatrt.data.jsonl import Line, read_lines, split
from coatrt.data.task_data import TaskData, TaskKind
from coatrt.data.text import text_task
from coatrt.errors import ConfigError

__all__ = ["TASKS", "load_task"]

Sources = Sequence[str | Path]
T = TypeVar("T")


class _Loader(Protocol):
    def __call__(
        self, sources: Sources, tokenizer: Any, length: int, held_out: Sources | None, every: int
    ) -> TaskData: ...


def _text(sources: Sources, tokenizer: Any, length: int, held_out: Sources | None, every: int) -> TaskData:
    measured = read_documents(held_out) if held_out is not None else None
    return text_task(tokenizer, read_documents(sources), length, held_out=measured, every=every)


def _chat(sources: Sources, tokenizer: Any, length: int, held_out: Sources | None, every: int) -> TaskData:
    train, measured = _parts(sources, held_out, every, Conversation.from_line)
    return chat_task(tokenizer, train, measured, length)


def _choice(sources: Sources, tokenizer: Any, length: int, held_out: Sources | None, every: int) -> TaskData:
    train, measured = _parts(sources, held_out, every, Question.from_line)
    return choice_task(tokenizer, train, measured, length)


def _parts(
    sources: Sources, held_out: Sources | None, every: int, read: Callable[[Line], T]
) -> tuple[list[T], list[T]]:
    items = [read(line) for line in read_lines(sources)]
    if held_out is not None:
        return items, [read(line) for line in read_lines(held_out)]
    if len(items) < 2:
        raise ConfigError(
            f"one line is in {', '.join(map(str, sources))}; give at least two, one to train and one to measure on"
        )
    return split(items, every)


TASKS: Mapping[TaskKind, _Loader] = {"text": _text, "chat": _chat, "choice": _choice}
"""Loader by kind of task."""


def load_task(
    kind: str,
    sources: Sources,
    tokenizer: Any,
    length: int,
    *,
    held_out: Sources | None = None,
    every: int = 10,
) -> TaskData:
    """Read a task from files.

    Args:
        kind: "text" (UTF-8 text files), "chat" or "choice" (JSONL, see `Conversation.from_line`, `Question.from_line`).
        sources: files, or directories of *.txt or *.jsonl.
        tokenizer: the model's.
        length: tokens per block, or most tokens of a row.
        held_out: files to measure on; by default every tenth document or line, see `tokenize_text` and `split`.
        every: one in so many is held out.

    Raises:
        ConfigError: an unknown kind, or a file, line or split that is of no use; it names file and line.
    """
    if kind not in TASKS:
        raise ConfigError(f"task {kind!r} is given; allowed: {', '.join(TASKS)}")
    if length < 2:
        raise ConfigError(f"a length of {length} tokens is given; give at least 2, such as 128")
    return TASKS[cast(TaskKind, kind)](sources, tokenizer, length, held_out, every)
