"""A conversation as a line of JSON says it: messages, tools, and which answers are learned; every key is meant."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from coatrt.data.chat_template import Rendering
from coatrt.data.jsonl import Line
from coatrt.errors import ConfigError
from coatrt.system.json_data import parse_json

__all__ = ["Conversation", "Message"]

_LINE_KEYS = ("messages", "tools", "parallel_tool_calls")
_PASSED = ("name", "tool_calls", "tool_call_id", "refusal", "function_call", "reasoning_content", "thinking")
"""Keys of a message that some chat templates have."""
_MESSAGE_KEYS = ("role", "content", "weight", *_PASSED)


class Message(NamedTuple):
    """One message.

    Args:
        role: who says it.
        content: what is said; empty where the assistant only calls functions.
        learned: whether an assistant's message is trained on.
        more: its other keys, for the chat template.
    """

    role: str
    content: str
    learned: bool = True
    more: Mapping[str, Any] = {}  # never written to

    @property
    def shown(self) -> dict[str, Any]:
        """What a chat template sees of it."""
        return {"role": self.role, "content": self.content, **self.more}


@dataclass(frozen=True)
class Conversation:
    """Messages, or a prompt and its completion.

    Args:
        messages: messages, or (role, content), in order; one of them the assistant's and learned, and not the first.
        plain: whether it is a prompt and a completion: without a chat template they are put together as they are.
        where: file and line, for messages.
        tools: functions that the assistant may call, as JSON describes them.

    Raises:
        ConfigError: the assistant says nothing that is learned, or speaks first.
    """

    messages: Sequence[Message | tuple[str, str]]
    plain: bool = False
    where: str = "a conversation"
    tools: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", self.turns)
        roles = [turn.role for turn in self.turns]
        if "assistant" not in roles:
            raise ConfigError(f"{self.where} has no message of the assistant; give at least one, it is what is learned")
        if roles[0] == "assistant":
            raise ConfigError(f"{self.where}: the assistant speaks first; begin with a message of the user")
        if not any(turn.role == "assistant" and turn.learned for turn in self.turns):
            raise ConfigError(f"{self.where} has no message of the assistant with weight 1; leave the line out")

    @property
    def turns(self) -> tuple[Message, ...]:
        """The messages."""
        return tuple(message if isinstance(message, Message) else Message(*message) for message in self.messages)

    def rendering(self, count: int | None = None, *, prompt: bool = False) -> Rendering:
        """Return the first `count` messages for a template, and with `prompt` the opening of the assistant's next."""
        return Rendering([turn.shown for turn in self.turns[:count]], self.tools, prompt)

    def claims(self) -> list[tuple[str, Rendering]]:
        """Return everything beside the plain exchange, named, with the conversation as it is without that.

        A template that renders both alike leaves out what the line says.
        """
        whole, found = self.rendering(), []

        def without(name: str, messages: Sequence[Mapping[str, Any]]) -> None:
            found.append((name, replace(whole, messages=messages)))

        if self.tools:
            found.append(("tools", replace(whole, tools=())))
        for i, turn in enumerate(self.turns):
            before, shown, after = whole.messages[:i], turn.shown, whole.messages[i + 1 :]
            for key in turn.more:
                if key != "tool_call_id" or not self._in_order(i):
                    rest = {name: value for name, value in shown.items() if name != key}
                    without(f"{key} of message {i + 1}", [*before, rest, *after])
            if turn.content and turn.more:
                without(f"content of message {i + 1}", [*before, {**shown, "content": ""}, *after])
            elif turn.role not in ("user", "assistant"):
                without(f"message {i + 1}, of the role {turn.role}", [*before, *after])
        return found

    def _in_order(self, place: int) -> bool:
        """Return whether the result at `place` is that of the call in the same place: its id says nothing more."""
        first = place
        while first and self.turns[first - 1].role == "tool":
            first -= 1
        calls = self.turns[first - 1].more.get("tool_calls", []) if first else []
        number = place - first
        return number < len(calls) and calls[number].get("id") == self.turns[place].more["tool_call_id"]

    @classmethod
    def from_line(cls, line: Line) -> "Conversation":
        """Read {"messages": [{"role": text, "content": text}, …]} or {"prompt": text, "completion": text}.

        Of OpenAI's format for fine-tuning it takes also weight (0 or 1), tools and tool_calls, and content as a list
        of one text part.

        Raises:
            ConfigError: a key is missing or unknown, or a value is of another kind.
        """
        value = line.value
        if "messages" in value:
            line.check_keys(_LINE_KEYS)
            if value.get("parallel_tool_calls") is not None:
                raise ConfigError(f"{line.where} has parallel_tool_calls, which no chat template has; remove it")
            messages = value["messages"]
            if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
                raise ConfigError(
                    f'{line.where}: messages is no list of objects; give [{{"role": …, "content": …}}, …]'
                )
            tools = value.get("tools") or []
            if not isinstance(tools, list) or not all(isinstance(tool, dict) and tool for tool in tools):
                raise ConfigError(f"{line.where}: tools is no list of objects; give a description of each function")
            turns = tuple(_message(line, i, message) for i, message in enumerate(messages, 1))
            return cls(turns, where=line.where, tools=tuple(tools))
        for key in ("prompt", "completion"):
            if key not in value:
                raise ConfigError(
                    f"{line.where} has no {key!r}; a chat line has the key messages, or prompt and completion"
                )
        line.check_keys(("prompt", "completion"))
        pair = (line.text("prompt", value["prompt"]), line.text("completion", value["completion"]))
        return cls((("user", pair[0]), ("assistant", pair[1])), True, line.where)


def _message(line: Line, number: int, value: Mapping[str, Any]) -> Message:
    """Return one message of a line; null stands for a key that is not there."""
    line.check_keys(_MESSAGE_KEYS, value, f" message {number}")
    given = {key: item for key, item in value.items() if item is not None}
    calls = "tool_calls" in given
    for key in ("role", "content"):
        if key not in given and not (calls and key == "content"):
            raise ConfigError(f"{line.where} has a message without {key}; give role and content")
    role = line.text("role", given["role"])
    weight = given.get("weight", 1)
    if type(weight) is not int or weight not in (0, 1):
        raise ConfigError(f"{line.where}: weight is {str(weight)[:60]}; give 0 or 1")
    if "weight" in given and role != "assistant":
        raise ConfigError(f"{line.where}: message {number}, of the role {role}, has a weight; only the assistant's has")
    content = _content(line, given.get("content", ""))
    if not (content == "" and (calls or role == "tool")):
        line.text("content", content)
    more = {key: given[key] for key in _PASSED if key in given}
    if calls:
        more["tool_calls"] = _calls(line, given["tool_calls"])
    return Message(role, content, bool(weight), more)


def _content(line: Line, value: Any) -> Any:
    """Return content, where it is a list of one text part that text."""
    if not isinstance(value, list):
        return value
    if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("type") != "text":
        raise ConfigError(f'{line.where}: content is a list; give a text, or [{{"type": "text", "text": …}}]')
    line.check_keys(("type", "text"), value[0], " content")
    return line.text("text", value[0].get("text"))


def _calls(line: Line, value: Any) -> list[dict[str, Any]]:
    """Return calls of functions with their arguments as objects, which is what chat templates take."""
    remedy = 'give [{"id": …, "type": "function", "function": {"name": …, "arguments": …}}]'
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{line.where}: tool_calls is no list with calls in it; {remedy}")
    made = []
    for call in value:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or call.get("type", "function") != "function":
            raise ConfigError(f"{line.where}: tool_calls has no function in a call; {remedy}")
        line.check_keys(("id", "type", "function"), call, " tool_calls")
        line.check_keys(("name", "arguments"), function, " function")
        given = function.get("arguments")
        if isinstance(given, str):
            given = parse_json(given, f"{line.where}: arguments", "give a JSON object")
        if not isinstance(given, dict):
            raise ConfigError(f"{line.where}: arguments of a call are no object; {remedy}")
        made.append({**call, "function": {"name": line.text("name", function.get("name")), "arguments": given}})
    return made
