"""Task "chat": conversations or prompts with completions; only the assistant's tokens are predicted."""

from collections.abc import Sequence
from typing import Any

from coatrt.data.chat_template import ChatTemplate, Refusal, Rendering, chat_template
from coatrt.data.conversation import Conversation
from coatrt.data.encoding import encode
from coatrt.data.examples import Examples
from coatrt.data.task_data import TaskData
from coatrt.errors import ConfigError
from coatrt.system.progress import Progress, silent

__all__ = ["chat_task"]

_Row = tuple[list[int], list[bool]]


def _texts(template: ChatTemplate, conversation: Conversation, renderings: Sequence[Rendering]) -> list[str]:
    """Return the texts of renderings; everything a conversation holds beside its messages must change them.

    Raises:
        ConfigError: the template fails, or ignores a part of the conversation.
    """
    claims = conversation.claims()
    results = template.render([*renderings, *(rendering for _, rendering in claims)])
    texts = []
    for text in results[: len(renderings)]:
        if isinstance(text, Refusal):
            raise ConfigError(
                f"{conversation.where}: the chat template of {template.place} fails ({text.reason}); correct the line "
                "or the template"
            )
        texts.append(text)
    for (name, _), text in zip(claims, results[len(renderings) :], strict=True):
        if text == texts[0]:
            raise ConfigError(
                f"{conversation.where}: the chat template of {template.place} ignores {name}; remove it from the line, "
                "or use a model whose template renders it"
            )
    return texts


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the common prefix of two token rows."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _templated_row(tokenizer: Any, template: ChatTemplate, conversation: Conversation) -> tuple[_Row, list[int]]:
    """Return the rendered row and the end of each answer in it that is trained on.

    An answer is the difference of two renderings: the messages before it with the generation prompt, and the messages
    up to and including it. Both texts must be prefixes of the whole. Token positions are common prefixes of the
    tokenized texts, so a token across the boundary of prompt and answer belongs to the answer. Text after an answer's
    last special token is filling between messages (a line break), which no runtime asks the model for.
    """
    places = [i for i, turn in enumerate(conversation.turns) if turn.role == "assistant" and turn.is_target]
    renderings = [conversation.rendering()]
    for i in places:
        renderings += [conversation.rendering(i, prompt=True), conversation.rendering(i + 1)]
    texts = _texts(template, conversation, renderings)
    tokens, *parts = encode(tokenizer, texts)
    special = set(tokenizer.all_special_ids)
    marks, ends = [False] * len(tokens), []
    for number, i in enumerate(places):
        before, through = texts[1 + 2 * number : 3 + 2 * number]
        if not (through.startswith(before) and texts[0].startswith(through)):
            raise ConfigError(
                f"{conversation.where}: the chat template renders message {i + 1} differently depending on the "
                "messages around it, so its tokens cannot be marked; give lines that end with their only answer, or "
                "prompt and completion"
            )
        start, end = _common_prefix(parts[2 * number], tokens), _common_prefix(parts[2 * number + 1], tokens)
        last = next((j for j in range(end - 1, start - 1, -1) if tokens[j] in special), None)
        if last is not None and not tokenizer.decode(tokens[last + 1 : end]).strip():
            end = last + 1
        marks[start:end] = [True] * (end - start)
        ends.append(end)
    return (tokens, marks), ends


def _plain_row(tokenizer: Any, conversation: Conversation) -> tuple[_Row, list[int]]:
    """Return prompt + completion + end token; the prompt is tokenized alone, as a runtime does."""
    prompt, completion = (turn.content for turn in conversation.turns)
    (head,), (tail,) = encode(tokenizer, [prompt], special_tokens=True), encode(tokenizer, [completion])
    if not head:
        raise ConfigError(f"{conversation.where}: the prompt has no tokens; give a longer text")
    if tokenizer.eos_token_id is not None:
        tail.append(int(tokenizer.eos_token_id))
    return ([*head, *tail], [False] * len(head) + [True] * len(tail)), [len(head) + len(tail)]


def _rows(tokenizer: Any, conversations: Sequence[Conversation], max_length: int, progress: Progress) -> list[_Row]:
    """Return a row for each conversation with an answer that fits, cut after the last complete one."""
    rows = []
    for i, conversation in enumerate(conversations):
        template = chat_template(tokenizer, tools=bool(conversation.tools))
        if template is None and not conversation.plain:
            raise ConfigError(
                f"{conversation.where} holds messages, but the tokenizer has no chat template; give prompt and "
                "completion, or use a model with a template"
            )
        if template is None:
            (tokens, marks), ends = _plain_row(tokenizer, conversation)
        else:
            (tokens, marks), ends = _templated_row(tokenizer, template, conversation)
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

    With a chat template, a prompt and its completion become a user message and an assistant message. Without one they
    are concatenated and end with the tokenizer's end token.

    Args:
        tokenizer: a transformers tokenizer.
        train: conversations to train on.
        held_out: conversations to measure the loss on.
        max_length: maximum tokens of a row; a longer conversation is cut after the last complete answer that fits. If
            none fits, it is dropped and counted.
        progress: called after each conversation.

    Raises:
        ConfigError: the tokens of an answer cannot be marked, or no conversation fits.
    """
    rows = [_rows(tokenizer, conversations, max_length, progress) for conversations in (train, held_out)]
    for fitting, conversations, what in zip(rows, (train, held_out), ("train", "measure"), strict=True):
        if not fitting:
            raise ConfigError(
                f"none of {len(conversations)} conversations to {what} on has an answer within {max_length} tokens; "
                "give shorter ones or a larger --max-length"
            )
    dropped = len(train) + len(held_out) - sum(map(len, rows))
    return TaskData("chat", Examples.of_rows(rows[0]), Examples.of_rows(rows[1]), dropped=dropped)
