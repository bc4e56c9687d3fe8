"""Task "chat": conversations or prompts with completions; only what the assistant says is predicted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coatrt.data.examples import Examples
from coatrt.data.jsonl import Line
from coatrt.data.task_data import TaskData
from coatrt.errors import ConfigError
from coatrt.system.progress import Progress, silent

__all__ = ["Conversation", "chat_task"]

_Row = tuple[list[int], list[bool]]


@dataclass(frozen=True)
class Conversation:
    """Messages, or a prompt and its completion.

    Args:
        messages: (role, content) in order; at least one of them the assistant's, and not the first.
        plain: whether it is a prompt and a completion: without a chat template they are put together as they are.
        where: file and line, for messages.

    Raises:
        ConfigError: the assistant says nothing, or speaks first.
    """

    messages: tuple[tuple[str, str], ...]
    plain: bool = False
    where: str = "a conversation"

    def __post_init__(self) -> None:
        roles = [role for role, _ in self.messages]
        if "assistant" not in roles:
            raise ConfigError(f"{self.where} has no message of the assistant; give at least one, it is what is learned")
        if roles[0] == "assistant":
            raise ConfigError(f"{self.where}: the assistant speaks first; begin with a message of the user")

    @classmethod
    def from_line(cls, line: Line) -> "Conversation":
        """Read {"messages": [{"role": text, "content": text}, …]} or {"prompt": text, "completion": text}.

        Raises:
            ConfigError: a key is missing, or a value is of another kind.
        """
        value = line.value
        if "messages" in value:
            messages = value["messages"]
            if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
                raise ConfigError(
                    f'{line.where}: messages is no list of objects; give [{{"role": …, "content": …}}, …]'
                )
            for message in messages:
                for key in ("role", "content"):
                    if key not in message:
                        raise ConfigError(f"{line.where} has a message without {key}; give role and content")
            pairs = tuple((line.text("role", m["role"]), line.text("content", m["content"])) for m in messages)
            return cls(pairs, where=line.where)
        for key in ("prompt", "completion"):
            if key not in value:
                raise ConfigError(
                    f"{line.where} has no {key!r}; a chat line has the key messages, or prompt and completion"
                )
        pair = (line.text("prompt", value["prompt"]), line.text("completion", value["completion"]))
        return cls((("user", pair[0]), ("assistant", pair[1])), True, line.where)


def _render(tokenizer: Any, conversation: Conversation, count: int, prompt: bool) -> str:
    """Return the text of the first `count` messages, and with `prompt` the opening of the assistant's next."""
    from jinja2 import TemplateError

    messages = [{"role": role, "content": content} for role, content in conversation.messages[:count]]
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{conversation.where}: the model's chat template refuses it ({reason}); correct it"
        ) from None
    return text


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two rows begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _templated(tokenizer: Any, conversation: Conversation) -> tuple[_Row, list[int]]:
    """Return the rendered row and the end of each answer in it.

    An answer is what rendering adds between the messages before it, with the opening of an answer, and the messages up
    to and with it; both texts must be beginnings of the whole. Token places are counted as common prefixes of the
    tokenized texts, so a token that joins the end of the prompt with the start of the answer counts as answer. What
    follows an answer's last special token is the template's filling between messages (a line break), which no runtime
    asks the model for.
    """

    def encode(text: str) -> list[int]:
        return [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    count = len(conversation.messages)
    whole = _render(tokenizer, conversation, count, False)
    tokens = encode(whole)
    special = set(tokenizer.all_special_ids)
    marks, ends = [False] * len(tokens), []
    for i, (role, _) in enumerate(conversation.messages):
        if role != "assistant":
            continue
        before, through = _render(tokenizer, conversation, i, True), _render(tokenizer, conversation, i + 1, False)
        if not (through.startswith(before) and whole.startswith(through)):
            raise ConfigError(
                f"{conversation.where}: the model's chat template renders message {i + 1} differently with what stands "
                "before or after it, so the answer has no fixed place; give lines that end with their only answer, or "
                "prompt and completion"
            )
        start, end = _shared(encode(before), tokens), _shared(encode(through), tokens)
        last = next((j for j in range(end - 1, start - 1, -1) if tokens[j] in special), None)
        if last is not None and not tokenizer.decode(tokens[last + 1 : end]).strip():
            end = last + 1
        marks[start:end] = [True] * (end - start)
        ends.append(end)
    return (tokens, marks), ends


def _plain(tokenizer: Any, conversation: Conversation) -> tuple[_Row, list[int]]:
    """Return prompt + completion + end token, tokenized apart, so that the prompt is what a runtime would be given."""
    (_, prompt), (_, completion) = conversation.messages
    head = [int(token) for token in tokenizer(prompt, verbose=False)["input_ids"]]
    tail = [int(token) for token in tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]]
    if not head:
        raise ConfigError(f"{conversation.where}: the prompt has no tokens; give some text")
    if tokenizer.eos_token_id is not None:
        tail.append(int(tokenizer.eos_token_id))
    return ([*head, *tail], [False] * len(head) + [True] * len(tail)), [len(head) + len(tail)]


def _rows(tokenizer: Any, conversations: Sequence[Conversation], max_length: int, progress: Progress) -> list[_Row]:
    """Return a row for each conversation of which an answer fits, cut after the last answer that fits whole."""
    templated = bool(getattr(tokenizer, "chat_template", None))
    rows = []
    for i, conversation in enumerate(conversations):
        if not templated and not conversation.plain:
            raise ConfigError(
                f"{conversation.where} holds messages, and the model's tokenizer has no chat template; give prompt and "
                "completion, or a model with a template"
            )
        (tokens, marks), ends = (_templated if templated else _plain)(tokenizer, conversation)
        end = max((end for end in ends if end <= max_length), default=0)
        if any(marks[:end]):
            rows.append((tokens[:end], marks[:end]))
        progress(i + 1, len(conversations), "tokenizing")
    return rows


def chat_task(
    tokenizer: Any,
    train: Sequence[Conversation],
    held_out: Sequence[Conversation],
    max_length: int,
    progress: Progress = silent,
) -> TaskData:
    """Return conversations as examples in which the assistant's answers, with their end-of-turn token, are predicted.

    With a chat template, a prompt and its completion are a message of the user and one of the assistant; without one
    they are put together as they are and closed with the tokenizer's end token.

    Args:
        tokenizer: a transformers tokenizer.
        train: conversations to train on.
        held_out: conversations to measure the loss on.
        max_length: most tokens of a row; a longer conversation is cut after the last answer that fits whole, and
            dropped and counted where none does.
        progress: called after each conversation.

    Raises:
        ConfigError: the template has no fixed place for an answer, or no conversation fits.
    """
    rows = [_rows(tokenizer, conversations, max_length, progress) for conversations in (train, held_out)]
    for kept, conversations, what in zip(rows, (train, held_out), ("train", "measure"), strict=True):
        if not kept:
            raise ConfigError(
                f"none of {len(conversations)} conversations to {what} on has an answer within {max_length} "
                "tokens; give more of them, or a greater max length"
            )
    dropped = len(train) + len(held_out) - sum(map(len, rows))
    return TaskData("chat", Examples.of_rows(rows[0]), Examples.of_rows(rows[1]), dropped=dropped)
