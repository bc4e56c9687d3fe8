"""A request at work: its continuations are submitted, and their events come back to the event loop."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from coatrt.data.encoding import encode
from coatrt.engines.runtime.generate import ChatTemplateError, encode_chat
from coatrt.engines.runtime.text_stream import TextStream
from coatrt.engines.serving.answers import Answer, ChatAnswer, CompletionAnswer, usage
from coatrt.engines.serving.errors import ApiError, context_exceeded, invalid
from coatrt.engines.serving.models import Model, Models
from coatrt.engines.serving.requests import ChatRequest, CompletionRequest, Request
from coatrt.engines.serving.sequences import Continuation, End, Event, Job, Step
from coatrt.errors import CoatError

__all__ = ["Exchange"]


class Exchange:
    """A request whose prompts are tokens.

    Args:
        request: the request.
        model: the one that it names.
        base: whether it wants no LoRA.
        prompts: tokens of each prompt.
        field: the field with the prompt, for messages.
        form: the form of the answer.

    Raises:
        ApiError: a token is unknown, the request does not fit the context, or its configuration is refused.
    """

    def __init__(
        self,
        request: Request,
        model: Model,
        base: bool,
        prompts: Sequence[Sequence[int]],
        field: str,
        form: Answer,
    ) -> None:
        for prompt in prompts:
            unknown = next((token for token in prompt if token >= model.vocabulary), None)
            if unknown is not None:
                raise invalid(field, f"token id {unknown} is outside the vocabulary of {model.vocabulary}")
            if len(prompt) + (request.max_tokens or 1) > model.context:
                raise context_exceeded(len(prompt), request.max_tokens, model.context, field)
        for token in request.sampling.logit_bias:
            if token >= model.vocabulary:
                message = f"logit_bias has token id {token}, which is outside the vocabulary of {model.vocabulary}"
                raise invalid("logit_bias", message)
        self._request, self._model, self._prompts = request, model, [tuple(prompt) for prompt in prompts]
        self._lora = model.lora(base=base, configuration=request.configuration)
        self.form, self.stream, self.include_usage = form, request.stream, request.include_usage
        self.choices = len(prompts) * request.n
        self.prompt_tokens = sum(map(len, prompts))
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._job: Job | None = None

    @classmethod
    def completion(cls, models: Models, request: CompletionRequest) -> "Exchange":
        """Return the exchange of a request of /v1/completions.

        Raises:
            ApiError: see `Exchange`; there is no such model, or a prompt has no tokens.
        """
        model, base = models.find(request.model)
        prompts = []
        for prompt in request.prompts:
            ids = list(encode(model.tokenizer, [prompt], special_tokens=True)[0]) if isinstance(prompt, str) else prompt
            if not ids:
                raise invalid("prompt", "the prompt has no tokens; give some text")
            prompts.append(ids)
        form = CompletionAnswer(request.model, model.tokenizer, request.logprobs is not None)
        return cls(request, model, base, prompts, "prompt", form)

    @classmethod
    def chat(cls, models: Models, request: ChatRequest) -> "Exchange":
        """Return the exchange of a request of /v1/chat/completions.

        Raises:
            ApiError: see `Exchange`; there is no such model, it has no chat template, or that refuses the messages.
        """
        model, base = models.find(request.model)
        try:
            prompt = encode_chat(model.tokenizer, request.messages)
        except ChatTemplateError as error:
            code = None if error.refused else "no_chat_template"
            raise ApiError(str(error), param="messages", code=code) from None
        except CoatError as error:
            raise invalid("messages", str(error)) from None
        form = ChatAnswer(request.model, model.tokenizer, request.logprobs is not None)
        return cls(request, model, base, [prompt], "messages", form)

    def begin(self, arrival: float, limit: float) -> None:
        """Submit the continuations.

        Raises:
            ApiError: too many requests wait, or the server is stopping.
        """
        loop = asyncio.get_running_loop()

        def emit(index: int, event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        request, model = self._request, self._model
        self._job = Job(arrival, arrival + limit, emit)
        work = [
            Continuation(
                job=self._job,
                index=index,
                prompt=self._prompts[index // request.n],
                lora=self._lora,
                sampling=request.sampling,
                draws=index,
                text=TextStream(model.tokenizer, request.stop),
                ends=frozenset() if request.ignore_eos else model.ends,
                most=self._most(len(self._prompts[index // request.n])),
                logprobs=request.logprobs,
            )
            for index in range(self.choices)
        ]
        model.scheduler.submit(self._job, work)

    def _most(self, prompt: int) -> int:
        return self._request.max_tokens or self._model.context - prompt

    def cancel(self) -> None:
        """End the request at its next token, if it has not ended."""
        if self._job is not None and self._job.left:
            self._model.scheduler.cancel(self._job)

    async def events(self) -> AsyncIterator[tuple[int, Step | End]]:
        """Yield (index of the choice, event) until all choices have ended.

        Raises:
            ApiError: the request takes too long, the server is stopping, or it failed.
        """
        left = self.choices
        while left:
            index, event = await self._events.get()
            if isinstance(event, ApiError):
                raise event
            yield index, event
            left -= isinstance(event, End)

    def counted(self, index: int, end: End) -> int:
        """Return the cached tokens of a prompt that count for the usage: those of its first choice."""
        return end.cached if index % self._request.n == 0 else 0

    async def whole(self) -> dict[str, Any]:
        """Return the answer once all choices have ended.

        Raises:
            ApiError: see `events`.
        """
        choices: list[list[Step | End]] = [[] for _ in range(self.choices)]
        async for index, event in self.events():
            choices[index].append(event)
        ends = [events[-1] for events in choices]
        generated = sum(end.tokens for end in ends if isinstance(end, End))
        cached = sum(self.counted(i, end) for i, end in enumerate(ends) if isinstance(end, End))
        return self.form.whole(choices, usage(self.prompt_tokens, generated, cached))
