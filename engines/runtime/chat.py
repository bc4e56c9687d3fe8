"""A conversation with a decoder: its history, and what of it the cache has already."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coatrt.engines.runtime.decoder import CachedDecoder
from coatrt.engines.runtime.generate import encode_chat
from coatrt.engines.runtime.sampling import Sampler, Sampling
from coatrt.engines.runtime.text_stream import TextStream
from coatrt.errors import ConfigError

__all__ = ["Chat"]


class Chat:
    """A conversation; only what is new of it is computed in each turn.

    Args:
        decoder: a decoder of batch 1 with its LoRA bound.
        tokenizer: the bundle's tokenizer, with a chat template.
        ends: tokens that end a reply.
        system: the system message; empty for none.

    Raises:
        ConfigError: the decoder has another batch.
    """

    def __init__(self, decoder: CachedDecoder, tokenizer: Any, ends: Sequence[int] = (), *, system: str = "") -> None:
        if decoder.batch != 1:
            raise ConfigError(f"a chat needs a decoder of batch 1, got {decoder.batch}")
        self._decoder, self._tokenizer, self._ends = decoder, tokenizer, frozenset(ends)
        self._cached: list[int] = []  # tokens whose keys and values the decoder has
        self.messages: list[dict[str, str]] = []
        """The conversation so far: role and content, without the system message."""
        self.system = system
        self.reused = 0
        """Tokens of the last prompt that were not computed again."""
        self.tokens = 0
        """Tokens of the last reply."""
        self.reason = ""
        """Why the last reply ended: "stop", "length", or "cancelled" by the caller."""

    def reset(self) -> None:
        """Forget the conversation; the system message stays."""
        self.messages.clear()

    def undo(self) -> bool:
        """Forget the last message of the user and its reply; return whether there was one."""
        had = bool(self.messages)
        while self.messages and self.messages.pop()["role"] != "user":
            pass
        return had

    def reply(
        self, message: str, *, max_tokens: int | None = None, sampling: Sampling | None = None, stop: Sequence[str] = ()
    ) -> Iterator[str]:
        """Yield the reply to a message piece by piece; a caller that stops iterating ends it.

        The message and the reply, as far as it came, become part of the conversation.

        Args:
            message: the user's.
            max_tokens: most tokens; None for all that the context leaves.
            sampling: how tokens are chosen; greedy by default.
            stop: texts that end the reply.

        Raises:
            ConfigError: the conversation does not fit the context, or the chat template refuses it.
            BundleError: the logits are not finite.
        """
        opening = [{"role": "system", "content": self.system}] if self.system else []
        question = {"role": "user", "content": message}
        prompt = encode_chat(self._tokenizer, [*opening, *self.messages, question])
        room = self._decoder.capacity - len(prompt)
        if room < 1:
            raise ConfigError(
                f"the conversation has {len(prompt)} tokens, the context {self._decoder.capacity}: forget it with "
                "/reset, or use a longer --context"
            )
        return self._reply(question, prompt, min(room, max_tokens or room), sampling or Sampling(), stop)

    def _reply(
        self, question: dict[str, str], prompt: list[int], most: int, sampling: Sampling, stop: Sequence[str]
    ) -> Iterator[str]:
        text, sampler = TextStream(self._tokenizer, stop), Sampler(sampling, prompt)
        pieces: list[str] = []
        self.tokens, self.reason = 0, "cancelled"
        try:
            logits = self._read(prompt)
            while True:
                token = sampler.next(logits)
                if token in self._ends:
                    self.reason = "stop"
                    break
                self.tokens += 1
                pieces.append(text.push(token))
                yield pieces[-1]
                if text.stopped or self.tokens >= most:
                    self.reason = "stop" if text.stopped else "length"
                    break
                logits = self._append([token])
            pieces.append(text.close())
            if text.stopped:
                self.reason = "stop"
            yield pieces[-1]
        finally:
            self.messages += [question, {"role": "assistant", "content": "".join(pieces)}]

    def _read(self, prompt: list[int]) -> NDArray[np.float32]:
        """Compute what the cache lacks of a prompt, its last token at least; return the logits after it."""
        limit = min(len(self._cached), len(prompt) - 1)
        self.reused = next((i for i in range(limit) if self._cached[i] != prompt[i]), limit)
        del self._cached[self.reused :]
        return self._append(prompt[self.reused :])

    def _append(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        chunk = self._decoder.chunk or len(tokens)
        for begin in range(0, len(tokens), chunk):
            part = np.array([tokens[begin : begin + chunk]], np.int64)
            index = np.array([[part.shape[1] - 1]], np.int64)
            logits = self._decoder.run(part, np.array([len(self._cached)], np.int64), index)
            self._cached.extend(part[0].tolist())
        return np.asarray(logits[0, 0], np.float32)
