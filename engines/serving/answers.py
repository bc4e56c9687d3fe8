"""Events of continuations → the JSON of answers and of chunks of a stream."""

import secrets
import time
from collections.abc import Sequence
from typing import Any, Protocol

from coatrt.engines.serving.sequences import End, Entry, Step
from coatrt.models.bundle_tokenizer import token_bytes

__all__ = ["Answer", "ChatAnswer", "CompletionAnswer", "usage"]


def usage(prompt: int, generated: int, cached: int) -> dict[str, Any]:
    """Return the usage of a request, in tokens."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class Answer(Protocol):
    """The form of an endpoint's answers."""

    def whole(self, choices: Sequence[Sequence[Step | End]], usage: dict[str, Any]) -> dict[str, Any]:
        """Return the answer, given the events of each choice."""

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Return the chunks of a choice that come before its first token."""

    def chunk(self, index: int, event: Step | End) -> list[dict[str, Any]]:
        """Return the chunks of an event."""

    def envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a chunk with these choices."""


class _Form:
    """What both endpoints share."""

    _prefix: str
    _object: str

    def __init__(self, model: str, tokenizer: Any, logprobs: bool) -> None:
        self._model, self._tokenizer, self._logprobs = model, tokenizer, logprobs
        self._id, self._created = f"{self._prefix}-{secrets.token_hex(12)}", int(time.time())

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _text(self, token: int) -> str:
        return token_bytes(self._tokenizer, token).decode(errors="replace")

    def _end(self, events: Sequence[Step | End]) -> End:
        end = events[-1]
        assert isinstance(end, End)
        return end

    def _entries(self, events: Sequence[Step | End]) -> list[Entry]:
        return [event.entry for event in events if isinstance(event, Step) and event.entry is not None]


class CompletionAnswer(_Form):
    """Answers of /v1/completions."""

    _prefix, _object = "cmpl", "text_completion"

    def whole(self, choices: Sequence[Sequence[Step | End]], usage: dict[str, Any]) -> dict[str, Any]:
        """Return the answer, given the events of each choice."""
        values = [
            self._choice(index, "".join(event.text for event in events), self._end(events).reason, events, whole=True)
            for index, events in enumerate(choices)
        ]
        return {**self.envelope(values), "usage": usage}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Return no chunks."""
        return []

    def chunk(self, index: int, event: Step | End) -> list[dict[str, Any]]:
        """Return the chunks of an event."""
        reason = event.reason if isinstance(event, End) else None
        choice = self._choice(index, event.text, reason, [event], whole=False)
        if not event.text and reason is None and choice["logprobs"] is None:
            return []
        return [self.envelope([choice])]

    def envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a chunk with these choices."""
        return self._envelope(self._object, choices)

    def _choice(
        self, index: int, text: str, reason: str | None, events: Sequence[Step | End], *, whole: bool
    ) -> dict[str, Any]:
        entries = self._entries(events)
        logprobs = self._table(entries) if self._logprobs and (whole or entries) else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _table(self, entries: Sequence[Entry]) -> dict[str, Any]:
        top = [dict(reversed([*entry.likeliest, (entry.token, entry.logprob)])) for entry in entries]
        texts = [{self._text(token): value for token, value in values.items()} for values in top]
        return {
            "tokens": [self._text(entry.token) for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": texts if all(entry.likeliest for entry in entries) else None,
            "text_offset": [entry.offset for entry in entries],
        }


class ChatAnswer(_Form):
    """Answers of /v1/chat/completions."""

    _prefix, _object = "chatcmpl", "chat.completion"

    def whole(self, choices: Sequence[Sequence[Step | End]], usage: dict[str, Any]) -> dict[str, Any]:
        """Return the answer, given the events of each choice."""
        values = []
        for index, events in enumerate(choices):
            text = "".join(event.text for event in events)
            logprobs = {"content": self._content(events)} if self._logprobs else None
            message = {"role": "assistant", "content": text}
            reason = self._end(events).reason
            values.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason})
        return {**self._envelope(self._object, values), "usage": usage}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Return the chunk with the role."""
        return [self._chunk(index, {"role": "assistant", "content": ""}, None, None)]

    def chunk(self, index: int, event: Step | End) -> list[dict[str, Any]]:
        """Return the chunks of an event."""
        content = self._content([event])
        chunks = []
        if event.text or content:
            chunks.append(self._chunk(index, {"content": event.text}, {"content": content} if content else None, None))
        if isinstance(event, End):
            chunks.append(self._chunk(index, {}, None, event.reason))
        return chunks

    def envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a chunk with these choices."""
        return self._envelope(f"{self._object}.chunk", choices)

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self.envelope([choice])

    def _content(self, events: Sequence[Step | End]) -> list[dict[str, Any]]:
        return [
            {
                **self._entry(entry.token, entry.logprob),
                "top_logprobs": [self._entry(token, value) for token, value in entry.likeliest],
            }
            for entry in self._entries(events)
        ]

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = token_bytes(self._tokenizer, token)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}
