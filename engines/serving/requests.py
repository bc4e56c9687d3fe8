"""Bodies of requests → typed requests; docs/reference/openai-api.md is what they may hold."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coatrt.engines.runtime.sampling import Sampling
from coatrt.engines.serving.errors import ApiError, invalid
from coatrt.engines.serving.fields import (
    Check,
    at_most_texts,
    bias,
    flag,
    number,
    read_fields,
    shown,
    text,
    whole,
)
from coatrt.errors import ConfigError
from coatrt.system.json_data import parse_json

__all__ = ["ChatRequest", "CompletionRequest", "Request", "parse_body", "read_chat", "read_completion"]

MOST_CHOICES = 16
_MOST_TOKENS = 2**31 - 1
_DEEPEST = 32
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Request:
    """What both endpoints take.

    Args:
        model: the name that the client gave.
        sampling: how tokens are chosen.
        max_tokens: None for all that the context leaves.
        n: choices for each prompt.
        stop: stop strings.
        ignore_eos: go on after the model's end token.
        stream: whether the answer is a stream.
        include_usage: whether a stream ends with the usage.
        configuration: a configuration as JSON data, whose LoRA is wanted.
        logprobs: alternatives at each token; None for no log probabilities.
    """

    model: str
    sampling: Sampling
    max_tokens: int | None
    n: int
    stop: tuple[str, ...]
    ignore_eos: bool
    stream: bool
    include_usage: bool
    configuration: Any
    logprobs: int | None


@dataclass(frozen=True)
class CompletionRequest(Request):
    """A request of /v1/completions; prompts are texts or token ids."""

    prompts: tuple[str | tuple[int, ...], ...]


@dataclass(frozen=True)
class ChatRequest(Request):
    """A request of /v1/chat/completions; messages have role and content."""

    messages: tuple[dict[str, str], ...]


def parse_body(body: bytes) -> dict[str, Any]:
    """Return the object in the body of a request.

    Raises:
        ApiError: it is not a JSON object, has a key twice, or is nested too deep.
    """
    try:
        value = parse_json(body, "the request", "send a JSON object")
    except ConfigError as error:
        raise ApiError(str(error)) from None
    if not isinstance(value, dict):
        raise ApiError(f"the request must be a JSON object, got {shown(value)}")
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
        level = [inner for inner in level if isinstance(inner, dict | list)]
    if level:
        raise ApiError(f"the request is nested more than {_DEEPEST} levels deep; send it flat")
    return value


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise invalid(name, f"{name} must be an object, got {shown(value)}")
    return value


def _stream_options(name: str, value: Any) -> bool:
    inner = {f"{name}.{key}": each for key, each in _object(name, value).items()}
    return bool(read_fields(inner, {f"{name}.include_usage": flag}).get(f"{name}.include_usage", False))


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    check = whole(0, _MOST_TOKENS)
    return tuple(check(name, token) for token in value)


def _prompts(name: str, value: Any) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(value, str):
        return (text(name, value),)
    if not isinstance(value, list) or not value:
        raise invalid(name, f"{name} must be a text, a list of token ids, or a list of either, got {shown(value)}")
    if not isinstance(value[0], str | list):
        return (_token_ids(name, value),)
    if len(value) > MOST_CHOICES:
        raise invalid(name, f"{name} has {len(value)} prompts; give at most {MOST_CHOICES}")
    prompts: list[str | tuple[int, ...]] = []
    for each in value:
        if type(each) is not type(value[0]):
            raise invalid(name, f"{name} must be either texts or lists of token ids")
        prompts.append(text(name, each) if isinstance(each, str) else _token_ids(name, each))
    if not all(prompt for prompt in prompts):
        raise invalid(name, f"{name} has an empty prompt; give at least one token")
    return tuple(prompts)


def _messages(name: str, value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise invalid(name, f"{name} must be a list of at least one message, got {shown(value)}")
    messages = []
    for i, message in enumerate(value):
        where = f"{name}[{i}]"
        _object(where, message)
        unknown = next((key for key in message if key not in ("role", "content")), None)
        if unknown is not None:
            raise invalid(where, f"{where} has the unknown key {unknown[:60]!r}; allowed: role, content")
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise invalid(f"{where}.role", f"{where}.role must be one of {', '.join(_ROLES)}, got {shown(role)}")
        messages.append({"role": _ROLES[role], "content": _content(f"{where}.content", message.get("content"))})
    return tuple(messages)


def _content(where: str, value: Any) -> str:
    if not isinstance(value, list):
        return text(where, value)
    for part in value:
        if not isinstance(part, dict) or set(part) != {"type", "text"} or part["type"] != "text":
            raise invalid(where, f'{where} must be a text or a list of {{"type": "text", "text": …}}')
    return "".join(text(where, part["text"]) for part in value)


_COMMON: dict[str, Check] = {
    "model": text,
    "max_tokens": whole(1, _MOST_TOKENS),
    "temperature": number(0, 2),
    "top_p": number(0, 1, above=True),
    "top_k": whole(0, 1_000_000),
    "min_p": number(0, 1),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "repetition_penalty": number(0, 10, above=True),
    "logit_bias": bias,
    "seed": whole(0, 2**63 - 1),
    "n": whole(1, MOST_CHOICES),
    "stop": at_most_texts(16, 256),
    "ignore_eos": flag,
    "stream": flag,
    "stream_options": _stream_options,
    "configuration": _object,
    "user": text,
}
_COMPLETION = {**_COMMON, "prompt": _prompts, "logprobs": whole(0, 20)}
_CHAT = {
    **_COMMON,
    "messages": _messages,
    "max_completion_tokens": whole(1, _MOST_TOKENS),
    "logprobs": flag,
    "top_logprobs": whole(0, 20),
}
_SAMPLING = ("top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias")


def _required(fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        raise invalid(name, f"the request lacks {name}; give it")
    return fields[name]


def _common(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `Request` but `max_tokens` and `logprobs`."""
    stream = fields.get("stream", False)
    if "stream_options" in fields and not stream:
        raise invalid("stream_options", 'stream_options needs "stream": true')
    sampling = Sampling(
        temperature=fields.get("temperature", 1.0),
        seed=fields["seed"] if "seed" in fields else secrets.randbits(63),
        **{name: fields[name] for name in _SAMPLING if name in fields},
    )
    return {
        "model": _required(fields, "model"),
        "sampling": sampling,
        "n": fields.get("n", 1),
        "stop": fields.get("stop", ()),
        "ignore_eos": fields.get("ignore_eos", False),
        "stream": stream,
        "include_usage": fields.get("stream_options", False),
        "configuration": fields.get("configuration"),
    }


def read_completion(body: Mapping[str, Any]) -> CompletionRequest:
    """Return the request of /v1/completions in an object.

    Raises:
        ApiError: a field is unknown, missing or out of range.
    """
    fields = read_fields(body, _COMPLETION)
    common, prompts = _common(fields), _required(fields, "prompt")
    if len(prompts) * common["n"] > MOST_CHOICES:
        choices = f"{len(prompts)} prompts with n {common['n']} are {len(prompts) * common['n']} choices"
        raise invalid("n", f"{choices}; at most {MOST_CHOICES} are allowed: send several requests")
    return CompletionRequest(
        **common, max_tokens=fields.get("max_tokens", 16), logprobs=fields.get("logprobs"), prompts=prompts
    )


def read_chat(body: Mapping[str, Any]) -> ChatRequest:
    """Return the request of /v1/chat/completions in an object.

    Raises:
        ApiError: a field is unknown, missing or out of range.
    """
    fields = read_fields(body, _CHAT)
    common, messages = _common(fields), _required(fields, "messages")
    if "max_tokens" in fields and "max_completion_tokens" in fields:
        raise invalid("max_completion_tokens", "max_completion_tokens is another name of max_tokens; give one")
    if "top_logprobs" in fields and not fields.get("logprobs"):
        raise invalid("top_logprobs", 'top_logprobs needs "logprobs": true')
    return ChatRequest(
        **common,
        max_tokens=fields.get("max_tokens", fields.get("max_completion_tokens")),
        logprobs=fields.get("top_logprobs", 0) if fields.get("logprobs") else None,
        messages=messages,
    )
