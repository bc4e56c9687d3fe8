"""Clients that are slow on purpose: they hold connections open and send or read a little at a time."""

import socket
import time

from attacks import HEALTH, LONG, connect, post

__all__ = ["SLOW", "Slow"]


class Slow:
    """Connections that are held open and are sent, or read from, a little at a time, until they are told to end."""

    def __init__(
        self, count: int, first: bytes = b"", drip: bytes = b"", every: float = 1, read: int = 0, receive: int = 0
    ) -> None:
        self.count, self.first, self.drip, self.every, self.read, self.receive = (
            count,
            first,
            drip,
            every,
            read,
            receive,
        )

    def hold(self, port: int, until: float) -> list[float]:
        """Return the seconds that each connection lasted; one that the service has not ended lasts to the end."""
        opened: dict[socket.socket, float] = {}
        lasted = []
        for _ in range(self.count):
            try:
                connection = connect(port, self.receive)
                connection.sendall(self.first)
                connection.setblocking(False)
            except OSError:
                lasted.append(0.0)
                continue
            opened[connection] = time.monotonic()
        while opened and time.monotonic() < until:
            time.sleep(min(self.every, max(0, until - time.monotonic())))
            for connection, started in list(opened.items()):
                try:
                    if self.drip:
                        connection.send(self.drip)
                    if self.read and connection.recv(self.read) == b"":
                        raise ConnectionError
                except BlockingIOError:
                    pass
                except OSError:
                    lasted.append(time.monotonic() - started)
                    del opened[connection]
                    connection.close()
        for connection, started in opened.items():
            lasted.append(time.monotonic() - started)
            connection.close()
        return lasted


_METRICS = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
SLOW: dict[str, Slow] = {
    "heads, a byte at a time": Slow(60, b"GET /health HTTP/1.1\r\nX: ", b"x", 0.5, read=100),
    "headers, one at a time": Slow(30, b"GET /health HTTP/1.1\r\n", b"X: y\r\n", 0.5, read=100),
    "bodies, a byte at a time": Slow(60, post(b"x" * 1000)[:-1000], b" ", 0.5, read=100),
    "bodies that never come": Slow(30, post(b"x" * 1000, Expect="100-continue")[:-1000], read=100),
    "idle connections": Slow(60, read=100),
    "used once, then kept": Slow(30, HEALTH, read=1000),
    "answers that are never read": Slow(20, _METRICS * 2000, receive=1024),
    "streams that are never read": Slow(4, LONG, receive=1024),
    "streams, read a byte at a time": Slow(4, LONG, every=0.5, read=1, receive=1024),
    "line breaks before a request": Slow(20, b"\r\n", b"\r", 0.5, read=100),
}
