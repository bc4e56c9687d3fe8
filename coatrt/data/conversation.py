"""Conversations from lines of JSON: messages, tools, and which answers are trained on; unknown keys are refused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from coatrt.data.chat_template import Rendering
from coatrt.data.jsonl import Line
from coatrt.errors import ConfigError
from coatrt.system.json_data import parse_json

__all__ = ["Conversation", "Message"]

_LINE_KEYS = ("messages", "tools", "parallel_tool_calls")
_TEMPLATE_KEYS = ("name", "tool_calls", "tool_call_id", "refusal", "function_call", "reasoning_content", "thinking")
"""Keys of a message that some chat templates use."""
_MESSAGE_KEYS = ("role", "content", "weight", *_TEMPLATE_KEYS)


class Message(NamedTuple):
    """One message.

    Args:
        role: the speaker.
        content: the text; empty if the assistant only calls functions.
        is_target: whether a message of the assistant is trained on.
        more: its other keys, for the chat template.
    """

    role: str
    content: str
    is_target: bool = True
    more: Mapping[str, Any] = {}  # never modified

    @property
    def json(self) -> dict[str, Any]:
        """The message as a chat template sees it."""
        return {"role": self.role, "content": self.content, **self.more}


@dataclass(frozen=True)
class Conversation:
    """Messages, or a prompt and its completion.

    Args:
        messages: messages, or (role, content), in order; at least one of the assistant, not the first, is a target.
        plain: whether it is a prompt and a completion, which are concatenated if there is no chat template.
        where: file and line, for messages.
        tools: JSON descriptions of the functions that the assistant may call.

    Raises:
        ConfigError: no message of the assistant is trained on, or the first message is the assistant's.
    """

    messages: Sequence[Message | tuple[str, str]]
    plain: bool = False
    where: str = "a conversation"
    tools: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", self.turns)
        roles = [turn.role for turn in self.turns]
        if "assistant" not in roles:
            raise ConfigError(f"{self.where} has no message of the assistant; give at least one to train on")
        if roles[0] == "assistant":
            raise ConfigError(f"{self.where}: the first message is the assistant's; begin with a message of the user")
        if not any(turn.role == "assistant" and turn.is_target for turn in self.turns):
            raise ConfigError(f"{self.where} has no message of the assistant with weight 1; remove the line")

    @property
    def turns(self) -> tuple[Message, ...]:
        """The messages."""
        return tuple(message if isinstance(message, Message) else Message(*message) for message in self.messages)

    def rendering(self, count: int | None = None, *, prompt: bool = False) -> Rendering:
        """Return the first `count` messages for a template, with the generation prompt if `prompt`."""
        return Rendering([turn.json for turn in self.turns[:count]], self.tools, prompt)

    def claims(self) -> list[tuple[str, Rendering]]:
        """Return (name, conversation without it) for everything beside the texts of user and assistant.

        A template that renders the conversation alike without it ignores it.
        """
        whole, claims = self.rendering(), []

        def without(name: str, messages: Sequence[Mapping[str, Any]]) -> None:
            claims.append((name, replace(whole, messages=messages)))

        if self.tools:
            claims.append(("tools", replace(whole, tools=())))
        for i, turn in enumerate(self.turns):
            before, message, after = whole.messages[:i], turn.json, whole.messages[i + 1 :]
            for key in turn.more:
                if key != "tool_call_id" or not self._in_order(i):
                    rest = {name: value for name, value in message.items() if name != key}
                    without(f"{key} of message {i + 1}", [*before, rest, *after])
            if turn.content and turn.more:
                without(f"content of message {i + 1}", [*before, {**message, "content": ""}, *after])
            elif turn.role not in ("user", "assistant"):
                without(f"message {i + 1} of role {turn.role}", [*before, *after])
        return claims

    def _in_order(self, place: int) -> bool:
        """Return whether the tool result at `place` matches the call at the same index, so that its id adds nothing."""
        first = place
        while first and self.turns[first - 1].role == "tool":
            first -= 1
        calls = self.turns[first - 1].more.get("tool_calls", []) if first else []
        number = place - first
        return number < len(calls) and calls[number].get("id") == self.turns[place].more["tool_call_id"]

    @classmethod
    def from_line(cls, line: Line) -> "Conversation":
        """Read {"messages": [{"role": text, "content": text}, …]} or {"prompt": text, "completion": text}.

        From OpenAI's fine-tuning format it also accepts weight (0 or 1), tools and tool_calls, and content as a list of
        one text part.

        Raises:
            ConfigError: a key is missing or unknown, or a value has the wrong type.
        """
        value = line.value
        if "messages" in value:
            line.check_keys(_LINE_KEYS)
            if value.get("parallel_tool_calls") is not None:
                raise ConfigError(f"{line.where} has parallel_tool_calls, which no chat template uses; remove it")
            messages = value["messages"]
            if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
                raise ConfigError(f'{line.where}: messages must be a list of objects: [{{"role": …, "content": …}}, …]')
            tools = value.get("tools") or []
            if not isinstance(tools, list) or not all(isinstance(tool, dict) and tool for tool in tools):
                raise ConfigError(f"{line.where}: tools must be a list of objects, one per function")
            turns = tuple(_message(line, i, message) for i, message in enumerate(messages, 1))
            return cls(turns, where=line.where, tools=tuple(tools))
        for key in ("prompt", "completion"):
            if key not in value:
                raise ConfigError(f"{line.where} has no {key!r}; a chat line has messages, or prompt and completion")
        line.check_keys(("prompt", "completion"))
        pair = (line.text("prompt", value["prompt"]), line.text("completion", value["completion"]))
        return cls((("user", pair[0]), ("assistant", pair[1])), True, line.where)


def _message(line: Line, number: int, value: Mapping[str, Any]) -> Message:
    """Return one message of a line; null counts as a missing key."""
    line.check_keys(_MESSAGE_KEYS, value, f" message {number}")
    values = {key: item for key, item in value.items() if item is not None}
    calls = "tool_calls" in values
    for key in ("role", "content"):
        if key not in values and not (calls and key == "content"):
            raise ConfigError(f"{line.where} has a message without {key}; give role and content")
    role = line.text("role", values["role"])
    weight = values.get("weight", 1)
    if type(weight) is not int or weight not in (0, 1):
        raise ConfigError(f"{line.where}: weight must be 0 or 1, got {str(weight)[:60]}")
    if "weight" in values and role != "assistant":
        raise ConfigError(f"{line.where}: message {number} of role {role} has a weight; only the assistant's may")
    content = _content(line, values.get("content", ""))
    if not (content == "" and (calls or role == "tool")):
        line.text("content", content)
    more = {key: values[key] for key in _TEMPLATE_KEYS if key in values}
    if calls:
        more["tool_calls"] = _calls(line, values["tool_calls"])
    return Message(role, content, bool(weight), more)


def _content(line: Line, value: Any) -> Any:
    """Return content; of a list with one text part its text."""
    if not isinstance(value, list):
        return value
    if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("type") != "text":
        raise ConfigError(f'{line.where}: content must be a text or [{{"type": "text", "text": …}}]')
    line.check_keys(("type", "text"), value[0], " content")
    return line.text("text", value[0].get("text"))


def _calls(line: Line, value: Any) -> list[dict[str, Any]]:
    """Return function calls with their arguments as objects, as chat templates expect them."""
    remedy = 'give [{"id": …, "type": "function", "function": {"name": …, "arguments": …}}]'
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{line.where}: tool_calls must be a list of calls; {remedy}")
    calls = []
    for call in value:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or call.get("type", "function") != "function":
            raise ConfigError(f"{line.where}: a call in tool_calls has no function; {remedy}")
        line.check_keys(("id", "type", "function"), call, " tool_calls")
        line.check_keys(("name", "arguments"), function, " function")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = parse_json(arguments, f"{line.where}: arguments", "give a JSON object")
        if not isinstance(arguments, dict):
            raise ConfigError(f"{line.where}: the arguments of a call must be an object; {remedy}")
        calls.append({**call, "function": {"name": line.text("name", function.get("name")), "arguments": arguments}})
    return calls
