"""Task "choice": classification and multiple choice; training predicts the right choice's tokens given the prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from coatrt.data.documents import token_ids
from coatrt.data.examples import Examples
from coatrt.data.jsonl import Line
from coatrt.data.task_data import ChoiceSets, TaskData
from coatrt.errors import ConfigError
from coatrt.system.progress import Progress, silent

__all__ = ["Question", "choice_task"]

_Row = tuple[list[int], list[bool]]


@dataclass(frozen=True)
class Question:
    """A prompt, its possible continuations and the right one.

    Args:
        prompt: text before the choice. Its spaces at the end are given to the choices: tokenizers attach a space to the
            word after it.
        choices: at least two different texts, continuing the prompt letter by letter ("Type:" wants " person").
        answer: place of the right choice, counted from 0.
        where: file and line, for messages.

    Raises:
        ConfigError: fewer than two choices, equal ones, or an answer out of range.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int
    where: str = "a question"

    def __post_init__(self) -> None:
        if len(self.choices) < 2 or len(set(self.choices)) < len(self.choices):
            raise ConfigError(f"{self.where} has the choices {list(self.choices)}; give at least two, all different")
        if not 0 <= self.answer < len(self.choices):
            raise ConfigError(
                f"{self.where}: answer {self.answer} is given; the {len(self.choices)} choices are counted from 0 to "
                f"{len(self.choices) - 1}"
            )

    @classmethod
    def from_line(cls, line: Line) -> "Question":
        """Read {"prompt": text, "choices": [text, …], "answer": place of the right one}.

        Raises:
            ConfigError: a key is missing or unknown, or a value is of another kind.
        """
        line.check_keys(("prompt", "choices", "answer"))
        try:
            prompt, choices, answer = (line.value[key] for key in ("prompt", "choices", "answer"))
        except KeyError as error:
            raise ConfigError(
                f"{line.where} has no {error}; a choice line has the keys prompt, choices and answer"
            ) from None
        if not isinstance(choices, list):
            raise ConfigError(f"{line.where}: choices is a {type(choices).__name__}; give a list of texts")
        if isinstance(answer, bool) or not isinstance(answer, int):
            raise ConfigError(f"{line.where}: answer is {answer!r}; give the place of the right choice, counted from 0")
        texts = tuple(line.text("a choice", choice) for choice in choices)
        return cls(line.text("prompt", prompt), texts, answer, line.where)


def _encode(tokenizer: Any, questions: Sequence[Question], progress: Progress) -> list[list[_Row]]:
    """Return, for every question, a row per choice.

    Prompt and choice are tokenized apart, so that the prompt's tokens are those that a runtime would be given.
    """
    prompts = [question.prompt.rstrip(" ") for question in questions]
    spaces = [question.prompt[len(prompt) :] for question, prompt in zip(questions, prompts, strict=True)]
    texts = [space + text for question, space in zip(questions, spaces, strict=True) for text in question.choices]
    heads = token_ids(tokenizer, prompts, progress, special_tokens=True)
    tails = iter(token_ids(tokenizer, texts, progress))
    rows = []
    for question, head in zip(questions, heads, strict=True):
        own = [list(next(tails)) for _ in question.choices]
        if not head:
            raise ConfigError(f"{question.where}: the prompt has no tokens; give some text")
        for i, a in enumerate(own):
            for j, b in enumerate(own):
                if i != j and b[: len(a)] == a:
                    raise ConfigError(
                        f"{question.where}: the tokens of {question.choices[j]!r} begin with those of "
                        f"{question.choices[i]!r}, and can never score higher; end both with a full stop or the like"
                    )
        rows.append([([*head, *tail], [False] * len(head) + [True] * len(tail)) for tail in own])
    return rows


def choice_task(
    tokenizer: Any,
    train: Sequence[Question],
    held_out: Sequence[Question],
    max_length: int,
    progress: Progress = silent,
) -> TaskData:
    """Return questions as examples and choice sets.

    Args:
        tokenizer: a transformers tokenizer; the prompt gets its special tokens (such as one for the start).
        train: questions to train on, for the loss of the right choice.
        held_out: questions to measure loss and accuracy on.
        max_length: most tokens of prompt and choice; a longer question is dropped and counted, never cut.
        progress: called as prompts and choices are tokenized.

    Raises:
        ConfigError: a question cannot be scored, or none fits.
    """
    parts = []
    for questions, what in ((train, "train"), (held_out, "measure")):
        encoded = zip(questions, _encode(tokenizer, questions, progress), strict=True)
        kept = [(question, rows) for question, rows in encoded if max(len(tokens) for tokens, _ in rows) <= max_length]
        if not kept:
            raise ConfigError(
                f"none of {len(questions)} questions to {what} on fits into {max_length} "
                "tokens; give more of them, or a greater max length"
            )
        parts.append(kept)
    ours, theirs = parts
    dropped = len(train) + len(held_out) - len(ours) - len(theirs)
    right = [rows[question.answer] for question, rows in ours]
    choices = ChoiceSets(
        Examples.of_rows([row for _, rows in theirs for row in rows]),
        torch.tensor([i for i, (_, rows) in enumerate(theirs) for _ in rows]),
        torch.tensor([question.answer for question, _ in theirs]),
    )
    held = choices.rows[choices.starts + choices.answers]
    return TaskData("choice", Examples.of_rows(right), held, choices, dropped)
