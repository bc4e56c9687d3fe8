"""Runs the application in uvicorn until a signal ends it."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator, Mapping

import uvicorn

from coatrt.bundle import Bundle
from coatrt.engines.serving.app import Service
from coatrt.engines.serving.options import ServeOptions
from coatrt.errors import ConfigError

__all__ = ["serve"]

_CONNECTIONS = 1000
_LAST_SECONDS = 3  # for answers to leave, once everything has ended


def serve(
    bundles: Mapping[str, Bundle],
    options: ServeOptions = ServeOptions(),
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    listening: Callable[[str], None] | None = None,
) -> None:
    """Serve bundles with OpenAI's protocol until SIGTERM or Ctrl-C.

    The first signal refuses new requests and those that wait, lets running ones end for `ServeOptions.grace` seconds,
    and then ends them.

    Args:
        bundles: name → opened bundle; clients choose by name.
        options: how it runs.
        host: address to listen on; 0.0.0.0 for all.
        port: TCP port; 0 for a free one.
        listening: called with the URL once requests are answered.

    Raises:
        ConfigError: the address cannot be listened on, there is no bundle, or a name cannot be used.
        BuildError: a graph does not load, or there is not enough memory.
        BundleError: a file of a bundle was altered.
    """
    with _listen(host, port) as listener:
        service = Service(bundles, options)
        config = uvicorn.Config(
            service.app,
            access_log=False,
            log_config=None,
            lifespan="off",
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=int(options.grace) + _LAST_SECONDS,
            server_header=False,
            ws="none",
        )
        number = listener.getsockname()[1]
        url = f"http://{f'[{host}]' if ':' in host else host}:{number}"
        try:
            asyncio.run(_Server(config, service, options.grace, listening, url).run_until_signal(listener))
        finally:
            service.end()


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise ConfigError(f"port must be a whole number from 0 to 65535, got {port}")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen on {host}:{port} ({reason}); choose another --host or --port") from None


class _Server(uvicorn.Server):
    """uvicorn, with signals that end requests in order."""

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        grace: float,
        listening: Callable[[str], None] | None,
        url: str,
    ) -> None:
        super().__init__(config)
        self._service, self._grace, self._listening, self._url = service, grace, listening, url

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `run_until_signal`: uvicorn would send them to this process again in the end."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer, then say so."""
        await super().startup(sockets)
        if self.started and self._listening is not None:
            self._listening(self._url)

    async def run_until_signal(self, listener: socket.socket) -> None:
        """Serve until SIGTERM or SIGINT; a second one ends at once."""
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, self._stop, loop)
        try:
            await self.serve(sockets=[listener])
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _stop(self, loop: asyncio.AbstractEventLoop) -> None:
        if self.should_exit:
            self.force_exit = True
            self._service.end()
            return
        self.should_exit = True
        self._service.stop()
        loop.call_later(self._grace, self._service.cut)
