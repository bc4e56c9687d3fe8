"""The text of tokens as they come: complete characters only, ending before the first stop string."""

from collections.abc import Sequence
from typing import Any

__all__ = ["TextStream"]

_INCOMPLETE = "\ufffd"


class TextStream:
    """The growing text of one sequence.

    Tokens are decoded in a window that begins at the last but one piece of text: what a tokenizer's decoder does at
    the start of a text, such as removing a space, must not happen in its middle.

    Args:
        tokenizer: decodes tokens.
        stop: stop strings. No part of one is ever returned: what may be the beginning of one is held back.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._window: list[int] = []
        self._shown = 0  # tokens of the window whose text has been taken
        self._before = ""  # their text
        self._held = ""
        self.characters = 0
        """Complete characters so far, those of a stop string included."""
        self.stopped = False
        """Whether a stop string has ended the text; nothing follows it."""

    def push(self, token: int) -> str:
        """Return the text that a further token completes."""
        if self.stopped:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(_INCOMPLETE):
            return ""
        return self._take(text)

    def close(self) -> str:
        """Return what was held back, once there are no more tokens; incomplete characters are U+FFFD."""
        if self.stopped:
            return ""
        text = self._take(self._decode(self._window))
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _take(self, text: str) -> str:
        """Return what can be shown of a window's new text."""
        piece = text[len(self._before) :]
        rest = self._window[self._shown :]
        after = self._decode(rest)
        if after.strip():  # the next window begins here
            self._window, self._before = rest, after
            self._shown = len(rest)
        else:
            self._shown, self._before = len(self._window), text
        self.characters += len(piece)
        return self._before_stop(self._held + piece)

    def _before_stop(self, text: str) -> str:
        """Return the part of a text that no stop string can begin in, and hold back the rest."""
        matches = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stop if stop in text]
        if matches:
            self.stopped, self._held = True, ""
            return text[: min(matches)[1]]
        longest = max(map(len, self._stop), default=0) - 1
        begin = max(0, len(text) - longest) if longest > 0 else len(text)
        while begin < len(text) and not any(stop.startswith(text[begin:]) for stop in self._stop):
            begin += 1
        self._held = text[begin:]
        return text[:begin]
