"""Text generation with any decoder: greedy or sampled, one prompt or a batch of prompts of different lengths."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from coatrt.data.chat_template import Refusal, Rendering, chat_template
from coatrt.data.encoding import encode
from coatrt.engines.runtime.decoder import Decoder
from coatrt.engines.runtime.sampling import Sampler, Sampling
from coatrt.errors import ConfigError

__all__ = ["ChatTemplateError", "Generation", "encode_chat", "encode_prompt", "generate"]


@dataclass(frozen=True)
class Generation:
    """The continuation of one prompt.

    Args:
        tokens: the new tokens, without the stop token.
        reason: "stop" if a stop token or the caller ended it, "length" if a limit did.
    """

    tokens: tuple[int, ...]
    reason: Literal["stop", "length"]


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[int] = (),
    on_token: Callable[[int, int], object] | None = None,
) -> list[Generation]:
    """Continue each prompt until its own end.

    Args:
        decoder: a decoder with its LoRA bound.
        prompts: token ids; as many prompts as the decoder's batch.
        max_tokens: largest number of new tokens per prompt; the decoder's capacity limits it too.
        sampling: how tokens are chosen; greedy by default.
        stop: tokens that end a sequence.
        on_token: called with (row, token) after each new token; a row ends where it returns False.

    Raises:
        ConfigError: the prompts do not fit the decoder, or `max_tokens` is below 1.
        BundleError: the logits are not finite.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}")
    sampling, stops = sampling or Sampling(), set(stop)
    samplers = [Sampler(sampling, prompt, row) for row, prompt in enumerate(prompts)]
    continuations: list[list[int]] = [[] for _ in prompts]
    reasons: list[Literal["stop", "length"] | None] = [None] * len(prompts)
    logits = decoder.prefill(prompts)
    while True:
        inputs: list[int | None] = [None] * len(continuations)
        for row, tokens in enumerate(continuations):
            if reasons[row] is not None:
                continue
            token = samplers[row].next(logits[row])
            if token in stops:
                reasons[row] = "stop"
                continue
            tokens.append(token)
            if on_token is not None and on_token(row, token) is False:
                reasons[row] = "stop"
            elif len(tokens) >= max_tokens or int(decoder.lengths[row]) >= decoder.capacity:
                reasons[row] = "length"
            else:
                inputs[row] = token
        if all(reason is not None for reason in reasons):
            break
        logits = decoder.decode(inputs)
    return [
        Generation(tuple(tokens), reason or "length") for tokens, reason in zip(continuations, reasons, strict=True)
    ]


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool = False, system: str | None = None) -> list[int]:
    """Return the token ids of a prompt.

    Args:
        tokenizer: a bundle's tokenizer, or one of transformers.
        prompt: the text.
        chat: apply the tokenizer's chat template, with the prompt as the user's turn.
        system: the system message of a chat.

    Raises:
        ConfigError: the tokenizer has no chat template, the template refuses the turns, or the prompt is empty.
    """
    if chat:
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": prompt})
        try:
            return encode_chat(tokenizer, turns)
        except ChatTemplateError as error:
            hint = "run without --system, or without --chat" if system and error.refused else "run without --chat"
            raise ConfigError(f"{error}; {hint}") from None
    (ids,) = encode(tokenizer, [prompt], special_tokens=True)
    return _some(ids)


class ChatTemplateError(ConfigError):
    """A model without a chat template, or a template that refuses a conversation; `refused` says which."""

    def __init__(self, text: str, *, refused: bool) -> None:
        super().__init__(text)
        self.refused = refused


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the token ids of a conversation, with the opening of the assistant's next message.

    Args:
        tokenizer: a bundle's tokenizer, or one of transformers.
        messages: objects with role and content.

    Raises:
        ChatTemplateError: the tokenizer has no chat template, or the template refuses the messages.
        ConfigError: the rendered conversation is empty.
    """
    template = chat_template(tokenizer)
    if template is None:
        raise ChatTemplateError("the model's tokenizer has no chat template", refused=False)
    (text,) = template.render([Rendering(messages, prompt=True)])
    if isinstance(text, Refusal):
        line = f"the chat template of {template.place} refuses the prompt ({text.reason})"
        raise ChatTemplateError(line, refused=True)
    (ids,) = encode(tokenizer, [text])
    return _some(ids)


def _some(ids: list[int]) -> list[int]:
    if not ids:
        raise ConfigError("the prompt has no tokens; give some text")
    return ids
