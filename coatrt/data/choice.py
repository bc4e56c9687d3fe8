"""Task "choice": classification and multiple choice; training predicts the tokens of the right choice."""

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
    """A prompt, its choices and the right one.

    Args:
        prompt: text before the choice. Trailing spaces move to the choices: tokenizers attach a space to the next word.
        choices: at least two different texts that continue the prompt exactly ("Type:" needs " person").
        answer: index of the right choice, from 0.
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
            raise ConfigError(f"{self.where} has the choices {list(self.choices)}; give at least two different ones")
        if not 0 <= self.answer < len(self.choices):
            raise ConfigError(
                f"{self.where}: answer must be an index from 0 to {len(self.choices) - 1}, got {self.answer}"
            )

    @classmethod
    def from_line(cls, line: Line) -> "Question":
        """Read {"prompt": text, "choices": [text, …], "answer": index of the right one}.

        Raises:
            ConfigError: a key is missing or unknown, or a value has the wrong type.
        """
        line.check_keys(("prompt", "choices", "answer"))
        try:
            prompt, choices, answer = (line.value[key] for key in ("prompt", "choices", "answer"))
        except KeyError as error:
            raise ConfigError(
                f"{line.where} has no {error}; a choice line has the keys prompt, choices and answer"
            ) from None
        if not isinstance(choices, list):
            raise ConfigError(f"{line.where}: choices must be a list of texts, got {type(choices).__name__}")
        if isinstance(answer, bool) or not isinstance(answer, int):
            raise ConfigError(f"{line.where}: answer must be the index of the right choice, from 0, got {answer!r}")
        texts = tuple(line.text("a choice", choice) for choice in choices)
        return cls(line.text("prompt", prompt), texts, answer, line.where)


def _encode(tokenizer: Any, questions: Sequence[Question], progress: Progress) -> list[list[_Row]]:
    """Return, for every question, a row per choice.

    Prompt and choice are tokenized separately, so that the prompt has the tokens that a runtime sees.
    """
    prompts = [question.prompt.rstrip(" ") for question in questions]
    spaces = [question.prompt[len(prompt) :] for question, prompt in zip(questions, prompts, strict=True)]
    texts = [space + text for question, space in zip(questions, spaces, strict=True) for text in question.choices]
    heads = token_ids(tokenizer, prompts, progress, special_tokens=True)
    tails = iter(token_ids(tokenizer, texts, progress))
    rows = []
    for question, head in zip(questions, heads, strict=True):
        tails_here = [list(next(tails)) for _ in question.choices]
        if not head:
            raise ConfigError(f"{question.where}: the prompt has no tokens; give a longer text")
        for i, a in enumerate(tails_here):
            for j, b in enumerate(tails_here):
                if i != j and b[: len(a)] == a:
                    raise ConfigError(
                        f"{question.where}: the tokens of {question.choices[j]!r} begin with those of "
                        f"{question.choices[i]!r}, so they never score higher; end both with a full stop or the like"
                    )
        rows.append([([*head, *tail], [False] * len(head) + [True] * len(tail)) for tail in tails_here])
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
        tokenizer: a transformers tokenizer; the prompt gets its special tokens, such as a start token.
        train: questions to train on, with the loss of the right choice.
        held_out: questions to measure loss and accuracy on.
        max_length: maximum tokens of prompt and choice; a longer question is dropped and counted, never cut.
        progress: called as prompts and choices are tokenized.

    Raises:
        ConfigError: a question cannot be scored, or none fits.
    """
    parts = []
    for questions, what in ((train, "train"), (held_out, "measure")):
        encoded = zip(questions, _encode(tokenizer, questions, progress), strict=True)
        fitting = [
            (question, rows) for question, rows in encoded if max(len(tokens) for tokens, _ in rows) <= max_length
        ]
        if not fitting:
            raise ConfigError(
                f"none of {len(questions)} questions to {what} on fits into {max_length} tokens; "
                "give shorter ones or a larger --max-length"
            )
        parts.append(fitting)
    ours, theirs = parts
    dropped = len(train) + len(held_out) - len(ours) - len(theirs)
    right = [rows[question.answer] for question, rows in ours]
    choices = ChoiceSets(
        Examples.of_rows([row for _, rows in theirs for row in rows]),
        torch.tensor([i for i, (_, rows) in enumerate(theirs) for _ in rows]),
        torch.tensor([question.answer for question, _ in theirs]),
    )
    right_rows = choices.rows[choices.starts + choices.answers]
    return TaskData("choice", Examples.of_rows(right), right_rows, choices, dropped)
