"""The ASGI application: paths, the API key, bodies, streams."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from coatrt.bundle import Bundle
from coatrt.engines.serving.answers import usage
from coatrt.engines.serving.errors import ApiError
from coatrt.engines.serving.exchange import Exchange
from coatrt.engines.serving.metrics import Metrics
from coatrt.engines.serving.models import Models
from coatrt.engines.serving.options import ServeOptions
from coatrt.engines.serving.requests import parse_body, read_chat, read_completion
from coatrt.engines.serving.sequences import End

__all__ = ["Service", "openai_app"]

_MOST_BYTES = 1 << 20
_BODY_SECONDS = 30.0

_log = logging.getLogger("coatrt.serve")


class Service:
    """The models of a server and what its application answers.

    Args:
        bundles: name → opened bundle.
        options: how the server runs.

    Raises:
        CoatError: see `Models`.
    """

    def __init__(self, bundles: Mapping[str, Bundle], options: ServeOptions) -> None:
        self._options, self._metrics = options, Metrics()
        self._models = Models(bundles, options, self._metrics)
        self._created, self._stopping = int(time.time()), False
        schedulers = [model.scheduler for model in self._models]
        for name, help in (("running", "Requests at work"), ("waiting", "Requests in the queue")):

            def count(name: str = name) -> float:
                return float(sum(getattr(scheduler, name) for scheduler in schedulers))

            self._metrics.watch(f"coatrt_requests_{name}", help, count)
        post, get = ["POST"], ["GET"]
        self.app = Starlette(
            routes=[
                Route("/health", self._health, methods=get),
                Route("/metrics", self._show_metrics, methods=get),
                Route("/v1/models", self._keyed(self._list), methods=get),
                Route("/v1/models/{model:path}", self._keyed(self._one), methods=get),
                Route("/v1/completions", self._keyed(self._complete), methods=post),
                Route("/v1/chat/completions", self._keyed(self._chat), methods=post),
            ],
            exception_handlers={HTTPException: self._http_error},
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        self.end()

    def stop(self) -> None:
        """Refuse new requests and those that wait; let the others go on."""
        self._stopping = True
        for model in self._models:
            model.scheduler.stop()

    def cut(self) -> None:
        """End everything, without waiting for it."""
        self._stopping = True
        for model in self._models:
            model.scheduler.end()

    def end(self) -> None:
        """End everything, and wait until it has ended."""
        self.cut()
        for model in self._models:
            model.scheduler.join(5)

    def _keyed(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Return a handler that checks the API key, turns errors into answers, and counts them."""

        async def handle(request: Request) -> Response:
            began = time.monotonic()
            try:
                self._check_key(request)
                response = await handler(request)
            except ApiError as error:
                response = JSONResponse(error.to_json(), error.status, error.headers)
            except ClientDisconnect:
                response = Response(status_code=499)
            except Exception:
                _log.exception("a request failed")
                failure = ApiError("the server failed; its log says why", 500)
                response = JSONResponse(failure.to_json(), failure.status)
            if not isinstance(response, StreamingResponse):
                self._metrics.request(response.status_code, time.monotonic() - began)
            return response

        return handle

    def _check_key(self, request: Request) -> None:
        if self._options.api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        good = hmac.compare_digest(key.encode(), self._options.api_key.encode())
        if scheme.lower() != "bearer" or not good:
            message = "the API key is missing or wrong; send the header Authorization: Bearer KEY"
            raise ApiError(message, 401, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _http_error(self, request: Request, error: Exception) -> Response:
        """Answer what the routes do not know."""
        assert isinstance(error, HTTPException)
        path, method = request.url.path, request.method
        if request.url.path.startswith("/v1"):
            try:
                self._check_key(request)
            except ApiError as refusal:
                return JSONResponse(refusal.to_json(), refusal.status, refusal.headers)
        message = f"there is no path {path[:60]}; see /v1/models, /v1/completions and /v1/chat/completions"
        headers = dict(error.headers or {})
        if error.status_code == 405:
            allowed = "POST" if path.endswith("completions") else "GET"
            message, headers = f"{path[:60]} takes {allowed}, got {method[:20]}", {"Allow": allowed}
        answer = ApiError(message, error.status_code, headers=headers)
        self._metrics.request(error.status_code, 0.0)
        return JSONResponse(answer.to_json(), answer.status, answer.headers)

    async def _health(self, _: Request) -> Response:
        if self._stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    async def _show_metrics(self, _: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    def _entry(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "coatrt"}

    async def _list(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._entry(name) for name in self._models.names]})

    async def _one(self, request: Request) -> Response:
        name = request.path_params["model"]
        self._models.find(name)
        return JSONResponse(self._entry(name))

    async def _complete(self, request: Request) -> Response:
        body = await self._body(request)
        return await self._answer(request, lambda: Exchange.completion(self._models, read_completion(body)))

    async def _chat(self, request: Request) -> Response:
        body = await self._body(request)
        return await self._answer(request, lambda: Exchange.chat(self._models, read_chat(body)))

    async def _body(self, request: Request) -> dict[str, Any]:
        """Return the JSON object in the body.

        Raises:
            ApiError: another content type, too large, too slow, or not a JSON object.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(f"the content type must be application/json, got {kind[:60] or 'none'}", 415)
        data = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for part in request.stream():
                    data += part
                    if len(data) > _MOST_BYTES:
                        message = f"the body must be at most {_MOST_BYTES >> 20} MiB; send less"
                        raise ApiError(message, 413, headers={"Connection": "close"})
        except TimeoutError:
            raise ApiError(f"the body took longer than {_BODY_SECONDS:g} s; send it faster", 408) from None
        return parse_body(bytes(data))

    async def _answer(self, request: Request, prepare: Callable[[], Exchange]) -> Response:
        """Run a request to its end, or until the client leaves."""
        began = time.monotonic()
        exchange = await asyncio.to_thread(prepare)  # templates and tokenizers take their time
        exchange.begin(began, self._options.time_limit)
        if exchange.stream:
            return StreamingResponse(self._stream(exchange, began), media_type="text/event-stream")
        leaving = asyncio.ensure_future(_left(request))
        answering = asyncio.ensure_future(exchange.whole())
        try:
            await asyncio.wait({leaving, answering}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                raise ClientDisconnect
            return JSONResponse(answering.result())
        finally:
            exchange.cancel()
            for task in (leaving, answering):
                task.cancel()
            with suppress(asyncio.CancelledError, ApiError):
                await answering

    async def _stream(self, exchange: Exchange, began: float) -> AsyncIterator[bytes]:
        """Yield the events of a stream; the client's leaving cancels this."""
        form, generated, cached = exchange.form, 0, 0
        extra = {"usage": None} if exchange.include_usage else {}

        def event(value: Mapping[str, Any]) -> bytes:
            text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
            return b"data: " + text.encode() + b"\n\n"

        try:
            for index in range(exchange.choices):
                for chunk in form.opening(index):
                    yield event({**chunk, **extra})
            async for index, happened in exchange.events():
                for chunk in form.chunk(index, happened):
                    yield event({**chunk, **extra})
                if isinstance(happened, End):
                    generated += happened.tokens
                    cached += exchange.counted(index, happened)
            if exchange.include_usage:
                yield event({**form.envelope([]), "usage": usage(exchange.prompt_tokens, generated, cached)})
            self._metrics.request(200, time.monotonic() - began)
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            self._metrics.request(error.status, time.monotonic() - began)
            yield event(error.to_json())
        finally:
            exchange.cancel()


async def _left(request: Request) -> None:
    """Return when the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def openai_app(bundles: Mapping[str, Bundle], options: ServeOptions = ServeOptions()) -> Any:
    """Return an ASGI application that speaks OpenAI's protocol; any ASGI server runs it, in one process.

    Args:
        bundles: name → opened bundle; clients choose by name.
        options: how it runs.

    Raises:
        ConfigError: there is no bundle, or a name cannot be used.
        BuildError: a graph does not load, or there is not enough memory.
        BundleError: a file of a bundle was altered.
    """
    return Service(bundles, options).app
