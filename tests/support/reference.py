"""What a server must answer with temperature 0, from the decoder's logits and a sampler of few lines."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coatrt.bundle import Bundle
from coatrt.configs.config import ConfigPatterns
from coatrt.engines.runtime.emitter import Emitter
from coatrt.engines.runtime.load import load_decoder
from coatrt.engines.runtime.lora_file import load_lora

__all__ = ["Answer", "Reference"]

Edit = Callable[[NDArray[np.float64], list[int]], NDArray[np.float64]]


@dataclass(frozen=True)
class Answer:
    """Tokens, the log probabilities [V] of the model at each, and whether the end token came after them."""

    tokens: list[int]
    logprobs: list[NDArray[np.float64]]
    ended: bool


class Reference:
    """A bundle, one sequence at a time."""

    def __init__(self, path: Path, context: int, level: int = 4) -> None:
        self.bundle, self.context = Bundle.open(path), context
        self.tokenizer = self.bundle.tokenizer()
        self.stop = set(self.bundle.manifest["model"]["stop_tokens"])
        self.decoder = load_decoder(self.bundle, context=context, accuracy_level=level)
        self._answers: dict[tuple[Any, ...], Answer] = {}

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        (ids,) = self.tokenizer([text], add_special_tokens=special)["input_ids"]
        return list(ids)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def chat(self, *messages: tuple[str, str]) -> list[int]:
        """Return the tokens of a conversation of (role, content), with the opening of the assistant's message."""
        import jinja2

        template = self.tokenizer.get_chat_template()
        text = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
        turns = [{"role": role, "content": content} for role, content in messages]
        special = self.tokenizer.special_tokens_map
        return self.encode(text.render(messages=turns, add_generation_prompt=True, **special), special=False)

    def greedy(
        self,
        prompt: Sequence[int],
        count: int,
        *,
        lora: Any = "own",
        edit: Edit | None = None,
        past_end: bool = False,
    ) -> Answer:
        """Return the likeliest continuation.

        Args:
            prompt: token ids.
            count: most tokens.
            lora: "own", "base" for none, or a configuration as JSON data.
            edit: changes logits [V], given the answer's tokens so far.
            past_end: go on after the end token.
        """
        key = (*prompt, "|", count, str(lora), past_end)
        if edit is None and key in self._answers:
            return self._answers[key]
        self._set_lora(lora)
        logits = self.decoder.prefill([prompt])[0].astype(np.float64)
        tokens: list[int] = []
        rows: list[NDArray[np.float64]] = []
        ended = False
        while len(tokens) < count:
            choice = int(np.argmax(logits if edit is None else edit(logits.copy(), tokens)))
            if choice in self.stop and not past_end:
                ended = True
                break
            shifted = logits - logits.max()
            rows.append(shifted - np.log(np.exp(shifted).sum()))
            tokens.append(choice)
            if len(tokens) < count:
                logits = self.decoder.decode([choice])[0].astype(np.float64)
        answer = Answer(tokens, rows, ended)
        if edit is None:
            self._answers[key] = answer
        return answer

    def _set_lora(self, lora: Any) -> None:
        contract = self.bundle.contract
        if lora == "own":
            self.decoder.set_lora(load_lora(self.bundle.path(self.bundle.manifest["lora"]), contract))
        elif lora == "base":
            self.decoder.set_lora(None)
        else:
            config = ConfigPatterns.from_json(lora).resolve(self.bundle.model_matrices)
            self.decoder.set_lora(Emitter.of(self.bundle, 1).emit(config))
