"""Task "chat": conversations or prompts with completions; only what the assistant says is predicted."""

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


def _texts(template: ChatTemplate, conversation: Conversation, wanted: Sequence[Rendering]) -> list[str]:
    """Return renderings that a template must have; what a conversation claims beside its exchange must change them.

    Raises:
        ConfigError: the template fails, or renders the conversation as if something in it were not there.
    """
    claims = conversation.claims()
    made = template.render([*wanted, *(rendering for _, rendering in claims)])
    texts = []
    for text in made[: len(wanted)]:
        if isinstance(text, Refusal):
            raise ConfigError(
                f"{conversation.where}: the chat template of {template.place} refuses it ({text.reason}); correct it"
            )
        texts.append(text)
    for (name, _), text in zip(claims, made[len(wanted) :], strict=True):
        if text == texts[0]:
            raise ConfigError(
                f"{conversation.where}: the chat template of {template.place} leaves out {name}; remove it from the "
                "line, or train a model whose template has it"
            )
    return texts


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two rows begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _templated(tokenizer: Any, template: ChatTemplate, conversation: Conversation) -> tuple[_Row, list[int]]:
    """Return the rendered row and the end of each answer in it that is learned.

    An answer is what rendering adds between the messages before it, with the opening of an answer, and the messages up
    to and with it; both texts must be beginnings of the whole. Token places are counted as common prefixes of the
    tokenized texts, so a token that joins the end of the prompt with the start of the answer counts as answer. What
    follows an answer's last special token is the template's filling between messages (a line break), which no runtime
    asks the model for.
    """
    places = [i for i, turn in enumerate(conversation.turns) if turn.role == "assistant" and turn.learned]
    wanted = [conversation.rendering()]
    for i in places:
        wanted += [conversation.rendering(i, prompt=True), conversation.rendering(i + 1)]
    texts = _texts(template, conversation, wanted)
    tokens, *parts = encode(tokenizer, texts)
    special = set(tokenizer.all_special_ids)
    marks, ends = [False] * len(tokens), []
    for number, i in enumerate(places):
        before, through = texts[1 + 2 * number : 3 + 2 * number]
        if not (through.startswith(before) and texts[0].startswith(through)):
            raise ConfigError(
                f"{conversation.where}: the model's chat template renders message {i + 1} differently with what stands "
                "before or after it, so the answer has no fixed place; give lines that end with their only answer, or "
                "prompt and completion"
            )
        start, end = _shared(parts[2 * number], tokens), _shared(parts[2 * number + 1], tokens)
        last = next((j for j in range(end - 1, start - 1, -1) if tokens[j] in special), None)
        if last is not None and not tokenizer.decode(tokens[last + 1 : end]).strip():
            end = last + 1
        marks[start:end] = [True] * (end - start)
        ends.append(end)
    return (tokens, marks), ends


def _plain(tokenizer: Any, conversation: Conversation) -> tuple[_Row, list[int]]:
    """Return prompt + completion + end token, tokenized apart, so that the prompt is what a runtime would be given."""
    prompt, completion = (turn.content for turn in conversation.turns)
    (head,), (tail,) = encode(tokenizer, [prompt], special_tokens=True), encode(tokenizer, [completion])
    if not head:
        raise ConfigError(f"{conversation.where}: the prompt has no tokens; give some text")
    if tokenizer.eos_token_id is not None:
        tail.append(int(tokenizer.eos_token_id))
    return ([*head, *tail], [False] * len(head) + [True] * len(tail)), [len(head) + len(tail)]


def _rows(tokenizer: Any, conversations: Sequence[Conversation], max_length: int, progress: Progress) -> list[_Row]:
    """Return a row for each conversation of which an answer fits, cut after the last answer that fits whole."""
    rows = []
    for i, conversation in enumerate(conversations):
        template = chat_template(tokenizer, tools=bool(conversation.tools))
        if template is None and not conversation.plain:
            raise ConfigError(
                f"{conversation.where} holds messages, and the model's tokenizer has no chat template; give prompt and "
                "completion, or a model with a template"
            )
        if template is None:
            (tokens, marks), ends = _plain(tokenizer, conversation)
        else:
            (tokens, marks), ends = _templated(tokenizer, template, conversation)
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
