"""Measures a chat template: the texts around a message of each role, for runtimes without a template engine."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from coatrt.data.chat_template import ChatTemplate, Refusal, Rendering

__all__ = ["Around", "ChatShape", "chat_shape"]

Message = Mapping[str, str]

_MARK = "Xq0zX"  # contents that stand for themselves, and that no template looks for
_CONTENTS = (
    "Hello there",
    "",
    " spaced ",
    "\n\ntwo lines\n and one\n\n",
    "<|im_start|>user\nx<|im_end|>",
    "[INST] x [/INST]</s>",
    "{{ x }} {% if y %}z{% endif %}",
    "é 日本語 🙂",
    "\u00a0no\u2003break\u00a0",
    "'quotes' & \"double\" \\ <b>",
    "so</think>why",
    "<think>\nwhy\n</think>\n\nso",
    "# Title\n- item\n```py\nx = 1\n```",
    "word " * 300,
)
_THOUGHTS = "</think>"


@dataclass(frozen=True)
class Around:
    """The texts before and after a message's content."""

    before: str
    after: str


@dataclass(frozen=True)
class ChatShape:
    """What a template of the common shape renders: a start, each message between two texts, a prompt.

    Args:
        start: text before a conversation that begins with a system message.
        start_without_system: text before any other conversation, such as a system message of the template's own.
        prompt: the opening of the assistant's next message.
        roles: role → the texts around its messages; a role that is missing is refused.
        strip: whether the template strips white space around contents.
        drop_before: a text up to which the assistant's contents are dropped, with the line breaks after it; or none.
        alternate: whether user and assistant must take turns, the user first.
        system_first: whether a system message is only possible as the first.
        ends_with_user: whether the last message must be the user's.
    """

    start: str
    start_without_system: str
    prompt: str
    roles: Mapping[str, Around]
    strip: bool = False
    drop_before: str = ""
    alternate: bool = False
    system_first: bool = False
    ends_with_user: bool = False

    def refuses(self, messages: Sequence[Message]) -> bool:
        """Return whether the order of the messages is none that this shape renders."""
        turns = [message["role"] for message in messages if message["role"] != "system"]
        if any(message["role"] not in self.roles for message in messages):
            return True
        if self.system_first and any(message["role"] == "system" for message in messages[1:]):
            return True
        if self.alternate and turns != [("user", "assistant")[i % 2] for i in range(len(turns))]:
            return True
        return self.ends_with_user and turns[-1:] != ["user"]

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt of a conversation."""
        text = self.start if messages[0]["role"] == "system" else self.start_without_system
        for message in messages:
            content, around = message["content"], self.roles[message["role"]]
            if self.drop_before and message["role"] == "assistant" and self.drop_before in content:
                content = content.rpartition(self.drop_before)[2].lstrip("\n")
            text += around.before + (content.strip() if self.strip else content) + around.after
        return text + self.prompt

    def to_json(self) -> dict[str, Any]:
        """Return the content of `chat.json`."""
        roles = {role: {"before": around.before, "after": around.after} for role, around in self.roles.items()}
        return {**vars(self), "roles": roles}


def chat_shape(template: ChatTemplate) -> ChatShape | Refusal:
    """Return the shape of a template, or why it has none.

    The shape renders every conversation of a set of proofs as the template does, and refuses those that it refuses.

    Args:
        template: the chat template.

    Raises:
        ConfigError: the process that renders templates cannot be started.
    """
    if "strftime_now" in template.source:
        return Refusal("it writes the current date")
    shape = _measure(template)
    if isinstance(shape, Refusal):
        return shape
    for strip, drop in product((False, True), ("", _THOUGHTS)):
        candidate = _orders(template, replace(shape, strip=strip, drop_before=drop))
        if _proven(template, candidate):
            return candidate
    return Refusal("it renders some messages otherwise than as a text before, the content, and a text after")


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _texts(template: ChatTemplate, conversations: Sequence[Sequence[Message]], *, prompt: bool) -> list[str | None]:
    """Return the renderings; None for what the template refuses."""
    found = template.render([Rendering(messages, prompt=prompt) for messages in conversations])
    return [None if isinstance(text, Refusal) else text for text in found]


def _marked(*roles: str) -> list[dict[str, str]]:
    return [_message(role, f"{_MARK}{i}{_MARK}") for i, role in enumerate(roles)]


def _measure(template: ChatTemplate) -> ChatShape | Refusal:
    """Cut renderings of marked contents into the texts around them."""
    plain = _marked("user", "assistant", "user")
    system = _marked("system", "user", "assistant", "user")
    text, system_text = _texts(template, (plain, system), prompt=False)
    (text_prompt,) = _texts(template, (plain,), prompt=True)
    later, end = _texts(template, (_marked("user", "system", "user"), plain[:2]), prompt=False)
    if text is None or text_prompt is None:
        return Refusal("it refuses a conversation of user, assistant and user")
    gaps, ended = _gaps(text, 3), _gaps(end, 2) if end is not None else None
    if gaps is None or not text_prompt.startswith(text):
        return Refusal("it changes or moves the contents of messages, or the prompt is not at the end")
    # gaps: start + before user, after user + before assistant, after assistant + before user, after user
    after_user = gaps[3]
    if not gaps[1].startswith(after_user):
        return Refusal("what follows a user's message depends on its place")
    before_assistant = gaps[1][len(after_user) :]
    after_assistant = ended[2] if ended is not None and gaps[2].startswith(ended[2]) else _common_end(gaps)
    before_user = gaps[2][len(after_assistant) :]
    if not gaps[0].endswith(before_user):
        return Refusal("what precedes a user's message depends on its place")
    start = gaps[0][: len(gaps[0]) - len(before_user)]
    roles = {"user": Around(before_user, after_user), "assistant": Around(before_assistant, after_assistant)}
    shape = ChatShape(start, start, text_prompt[len(text) :], roles)
    system_gaps = _gaps(system_text, 4) if system_text is not None else None
    if system_gaps is None or not system_gaps[1].endswith(before_user):
        return shape if system_text is None else Refusal("it merges the system message with another")
    before_system, after_system = system_gaps[0], system_gaps[1][: len(system_gaps[1]) - len(before_user)]
    later_gaps = _gaps(later, 3) if later is not None else None
    system_start = ""
    if later_gaps is not None and later_gaps[1].startswith(after_user):
        inner = later_gaps[1][len(after_user) :]
        if before_system.endswith(inner):
            system_start, before_system = before_system[: len(before_system) - len(inner)], inner
    return replace(shape, start=system_start, roles={**roles, "system": Around(before_system, after_system)})


def _gaps(text: str | None, count: int) -> list[str] | None:
    """Return the texts between `count` marked contents, None where one is missing, moved or repeated."""
    gaps = []
    for i in range(count):
        before, mark, text = (text or "").partition(f"{_MARK}{i}{_MARK}")
        if not mark:
            return None
        gaps.append(before)
    return None if _MARK in (text or "") else [*gaps, text or ""]


def _common_end(gaps: list[str]) -> str:
    """Return what follows an assistant's message, where none can be the last: the gap without the user's beginning."""
    size = max(i for i in range(len(gaps[0]) + 1) if gaps[2].endswith(gaps[0][len(gaps[0]) - i :]))
    return gaps[2][: len(gaps[2]) - size]


def _orders(template: ChatTemplate, shape: ChatShape) -> ChatShape:
    """Return the shape with the orders of messages that the template refuses, or renders otherwise."""

    def agrees(*roles: str) -> bool:
        messages = _marked(*roles)
        (text,) = _texts(template, (messages,), prompt=True)
        return text == shape.render(messages)

    alternate = not (agrees("user", "user") and agrees("assistant", "user"))
    system = "system" in shape.roles
    return replace(
        shape,
        alternate=alternate,
        system_first=system and not (agrees("user", "system", "user") if not alternate else False),
        ends_with_user=not (agrees("user", "assistant") and (not system or agrees("system"))),
    )


def _proofs(shape: ChatShape) -> Iterator[list[dict[str, str]]]:
    orders: list[tuple[str, ...]] = [("user",), ("user", "assistant", "user"), ("user", "assistant") * 3 + ("user",)]
    orders += [("user", "assistant"), ("user", "user"), ("assistant", "user"), ("assistant",)]
    if "system" in shape.roles:
        orders += [("system", *order) for order in orders]
        orders += [("system",), ("user", "system", "user"), ("user", "assistant", "system", "user")]
    for order in orders:
        for i in range(len(_CONTENTS)):  # every content in every place
            yield [_message(role, _CONTENTS[(i + 3 * place) % len(_CONTENTS)]) for place, role in enumerate(order)]


def _proven(template: ChatTemplate, shape: ChatShape) -> bool:
    proofs = [messages for messages in _proofs(shape) if not shape.refuses(messages)]
    return _texts(template, proofs, prompt=True) == [shape.render(messages) for messages in proofs]
