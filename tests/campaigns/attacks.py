"""Attacks on the service: each opens its own connections and returns the status of every answer it got, 0 for none."""

import json
import random
import re
import socket
import struct
from collections.abc import Callable
from typing import Any

Attack = Callable[[int], list[int]]
MODEL = "m"
PATH = "/v1/completions"
CHAT = "/v1/chat/completions"


def connect(port: int, receive: int = 0, patience: float = 20) -> socket.socket:
    made = socket.socket()
    if receive:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    made.settimeout(patience)
    made.connect(("127.0.0.1", port))
    return made


def answers(connection: socket.socket) -> list[int]:
    """Read until the end of the connection and return the status of every answer."""
    read = b""
    try:
        while piece := connection.recv(1 << 16):
            read += piece
    except OSError:
        pass
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", read)] or [0]


def raw(*pieces: bytes, end: bool = False, patience: float = 20) -> Attack:
    """Send bytes, perhaps close the sending side, read what comes."""

    def attack(port: int) -> list[int]:
        with connect(port, patience=patience) as connection:
            try:
                for piece in pieces:
                    connection.sendall(piece)
                if end:
                    connection.shutdown(socket.SHUT_WR)
            except OSError:  # the service has ended it already
                pass
            return answers(connection)

    return attack


def named(body: Any) -> Any:
    """Return a request with the name of the model, which every request needs."""
    return {"model": MODEL, **body} if isinstance(body, dict) else body


def post(body: Any, path: str = PATH, **headers: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(named(body)).encode()
    lines = {"Content-Length": str(len(data)), "Content-Type": "application/json", "Connection": "close", **headers}
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{head}\r\n".encode() + data


def bodies(path: str, *values: Any) -> Attack:
    """Post one body after the other."""
    return lambda port: [status for value in values for status in raw(post(value, path))(port)]


def head(*lines: str) -> Attack:
    return raw("".join(f"{line}\r\n" for line in (*lines, "")).encode("latin-1"))


def leave(request: bytes, read: int, reset: bool) -> Attack:
    """Ask for many tokens, read a little, and go away."""

    def attack(port: int) -> list[int]:
        for _ in range(5):
            with connect(port) as connection:
                connection.sendall(request)
                if read:
                    connection.recv(read)
                if reset:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return [0]

    return attack


def many(count: int, payload: bytes, read: bool = True) -> Attack:
    """Open connections side by side, send the same on all of them, then read all."""

    def attack(port: int) -> list[int]:
        opened = [connect(port) for _ in range(count)]
        for connection in opened:
            connection.sendall(payload)
        found = [status for connection in opened for status in (answers(connection) if read else [0])]
        for connection in opened:
            connection.close()
        return found

    return attack


def churn(port: int) -> list[int]:
    for _ in range(1000):
        connect(port).close()
    return [0]


def random_bytes(port: int) -> list[int]:
    rng = random.Random(0)
    found = []
    for _ in range(50):
        found += raw(rng.randbytes(rng.randint(1, 400)) + b"\r\n\r\n", end=True)(port)
    return found


def damaged_requests(port: int) -> list[int]:
    """A valid request with one byte changed, dropped or doubled."""
    rng, whole, found = random.Random(1), post({"prompt": "the cat", "max_tokens": 2}), []
    for _ in range(100):
        at = rng.randrange(len(whole))
        middle = rng.choice((b"", rng.randbytes(1), whole[at : at + 1] * 2))
        found += raw(whole[:at] + middle + whole[at + 1 :], patience=0.2)(port)
    return found


def numbers(field: str, *values: str) -> Attack:
    return bodies(PATH, *(f'{{"model":"{MODEL}","prompt":"a","{field}":{value}}}'.encode() for value in values))


def nested(depth: int, opened: str, closed: str) -> bytes:
    return (opened * depth + closed * depth).encode()


DEEP = 150_000
HUGE = ("1e999", "-1e999", "9" * 400, "18446744073709551616", "-9223372036854775809", "1.5", "true", '"1"', "[]", "NaN")
LONG = post({"prompt": "the cat sat", "max_tokens": 90, "stream": True, "ignore_eos": True})
WHOLE = post({"prompt": "the cat sat", "max_tokens": 90, "ignore_eos": True})
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
CONFIGURED = {"prompt": "a", "max_tokens": 1}
_CONFIGURATIONS = [
    {**CONFIGURED, "configuration": {"default": "int8", "patterns": {f"*{i}*": "int8"}}} for i in range(300)
]

# name → (attack, the statuses it may get; 0 is no answer)
QUICK: dict[str, tuple[Attack, set[int]]] = {
    "random bytes": (random_bytes, {0, 400, 431}),
    "damaged requests": (damaged_requests, {0, 200, 400, 404, 405, 411, 413, 415, 503, 505}),
    "a TLS hello": (raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), end=True), {0, 400}),
    "an HTTP/2 preface": (raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), {400}),
    "empty lines": (raw(b"\r\n\r\n" * 50), {400}),
    "lone line feeds": (raw(b"GET /health HTTP/1.1\nHost: x\n\n", end=True), {0}),
    "a long method": (head("A" * 10_000 + " / HTTP/1.1"), {404, 405}),
    "HTTP/0.9 and HTTP/3": (lambda port: head("GET /health")(port) + head("GET /health HTTP/3.0")(port), {400, 505}),
    "other methods": (
        lambda port: [s for m in ("HEAD", "PUT", "TRACE", "get") for s in head(f"{m} /health HTTP/1.0")(port)],
        {405},
    ),
    "other targets": (
        lambda port: [
            s
            for target in ("http://x/health", "*", "x:443", "/../../etc/passwd", "/%00", "//health", "/health/")
            for s in head(f"GET {target} HTTP/1.0")(port)
        ],
        {400, 404},
    ),
    "a flood of headers": (head("GET /health HTTP/1.1", *(f"X-{i}: {i}" for i in range(5000))), {0, 431}),
    "a header of 1 MB": (raw(b"GET /health HTTP/1.1\r\nX: " + b"x" * 1_000_000), {0, 431}),
    "headers without a colon": (head("GET /health HTTP/1.1", "nothing"), {400}),
    "a folded header": (head("GET /health HTTP/1.1", "X: a", " b"), {400}),
    "NUL in a header": (head("GET /health HTTP/1.1", "X: a\0b"), {400}),
    "two lengths": (head(f"POST {PATH} HTTP/1.1", "Content-Length: 1", "Content-Length: 2"), {400}),
    "lengths that are none": (
        lambda port: [
            s
            for length in ("-1", "+1", "0x10", "1 1", "", "1e3", "٣")
            for s in raw(f"POST {PATH} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n".encode())(port)
        ],
        {400},
    ),
    "a length of 400 digits": (head(f"POST {PATH} HTTP/1.1", "Content-Length: " + "9" * 400), {413}),
    "a body of 2 MiB": (raw(post(bytes(2 << 20))), {0, 413}),
    "length and chunks": (raw(post(b"0\r\n\r\n" + HEALTH, Transfer_Encoding="chunked")), {411}),
    "chunks without end": (
        raw(post(b"", Transfer_Encoding="chunked"), *[b"1000\r\n" + b"a" * 4096 + b"\r\n"] * 500),
        {0, 411},
    ),
    "500 requests at once": (raw(HEALTH * 500, end=True), {0, 200}),
    "garbage behind a request": (raw(HEALTH + b"garbage\r\n\r\n" * 100), {200, 400}),
    "closed behind a request": (raw(HEALTH, end=True), {200}),
    "closed amid a body": (raw(post({"prompt": "a"})[:-3], end=True), {0}),
    "more body than said": (raw(post(b"{}", Content_Length="1")), {400}),
    "100-continue": (raw(post({"prompt": "a", "max_tokens": 1}, Expect="100-continue")), {200}),
    "gone amid a stream": (leave(LONG, 200, reset=False), {0}),
    "reset amid a stream": (leave(LONG, 200, reset=True), {0}),
    "gone before an answer": (leave(WHOLE, 0, reset=False), {0}),
    "reset before an answer": (leave(WHOLE, 0, reset=True), {0}),
    "deep lists": (bodies(PATH, b'{"model":"m","prompt":"a","configuration":' + nested(DEEP, "[", "]") + b"}"), {400}),
    "deep objects": (
        bodies(PATH, b'{"model":"m","prompt":"a","configuration":' + nested(DEEP, '{"a":', "}") + b"}"),
        {400},
    ),
    "a deep request": (bodies(PATH, nested(DEEP, "[", "]"), b"[" * 1_000_000, b'{"a":' * 200_000), {400}),
    "a deep conversation": (bodies(CHAT, nested(DEEP, "[", "]"), b'{"messages":' * 80_000), {400}),
    "wrong types": (
        bodies(
            PATH,
            *(
                {"prompt": "a", field: value}
                for field in (
                    "max_tokens",
                    "temperature",
                    "top_k",
                    "top_p",
                    "seed",
                    "stream",
                    "stop",
                    "n",
                    "logit_bias",
                )
                for value in ([None], {"a": [1]}, [[]], "x" * 300)
            ),
            *({"prompt": value} for value in (None, {}, [None], 1, [[]], [[[1]]], [1, "a"], [""])),
        ),
        {400},
    ),
    "wrong messages": (
        bodies(
            CHAT,
            {},
            *({"messages": value} for value in (None, [], {}, "a", [1], [[]], [{}], [{"role": "user"}])),
            *({"messages": [{"role": "user", "content": value}]} for value in (1, {}, [1], [{}], [{"type": "image"}])),
            {"messages": [{"role": "tool", "content": "a"}]},
            {"messages": [{"role": "user", "content": "a", "name": "b"}]},
        ),
        {400},
    ),
    "10,000 messages": (bodies(CHAT, {"messages": [{"role": "user", "content": "a"}] * 10_000}), {400}),
    "a flood of stop strings": (
        bodies(PATH, {"prompt": "a", "stop": ["a"] * 100_000}, {"prompt": "a", "stop": "a" * 9999}),
        {400},
    ),
    "stop strings that nearly match": (
        bodies(
            PATH,
            {
                "prompt": "a",
                "max_tokens": 60,
                "stop": ["a" * n + "b" for n in range(240, 256)],
                "logit_bias": {"97": 100},
            },
        ),
        {200},
    ),
    "a flood of biases": (bodies(PATH, {"prompt": "a", "logit_bias": {str(i): 1 for i in range(2000)}}), {400}),
    "16 choices of 16 prompts": (bodies(PATH, {"prompt": ["a"] * 16, "n": 16}, {"prompt": ["a"] * 200_000}), {400}),
    "16 choices": (bodies(PATH, {"prompt": "a", "n": 16, "max_tokens": 4, "logprobs": 20}), {200}),
    "wrong configurations": (
        bodies(
            PATH,
            *(
                {"prompt": "a", "configuration": value}
                for value in (
                    [],
                    {},
                    1,
                    "a",
                    {"default": 1},
                    {"patterns": []},
                    {"matrices": {"": 1}},
                    {"a": 1},
                )
            ),
        ),
        {400},
    ),
    "other models": (
        bodies(PATH, *({"model": name, "prompt": "a"} for name in ("", "M", "m:", "../m", "m" * 9000))),
        {404},
    ),
    "no body": (bodies(PATH, b"", b" ", b"\0", b"\xef\xbb\xbf"), {400}),
    "huge numbers": (
        lambda port: [s for field in ("max_tokens", "top_k", "seed") for s in numbers(field, *HUGE)(port)],
        {400},
    ),
    "huge reals": (numbers("temperature", "1e999", "-1e999", "9" * 400, "-1", "NaN", "Infinity", "[]"), {400}),
    "all tokens there are": (numbers("max_tokens", "9223372036854775807"), {400}),
    "NaN as a token": (numbers("prompt", "[NaN]", "[1e300]", "[-0.0]"), {400}),
    "ids that are none": (bodies(PATH, {"prompt": [-1]}, {"prompt": [2**62]}, {"prompt": [[-1]]}), {400}),
    "a list of 200,000 tokens": (bodies(PATH, {"prompt": [1] * 200_000}), {400}),
    "a prompt of 1 MB": (bodies(PATH, {"prompt": "a" * 1_000_000}, {"prompt": " " * 1_000_000}), {400}),
    "invalid UTF-8": (
        bodies(PATH, b'{"model":"m","prompt":"\xff\xfe"}', b'{"model":"m","prompt":"\xc0\x80"}', b'\xff{"a":1}'),
        {400},
    ),
    "half a surrogate": (
        bodies(PATH, rb'{"model":"m","prompt":"\ud800"}', rb'{"model":"m","prompt":"\udc00\ud800"}'),
        {400},
    ),
    "NUL in a prompt": (bodies(PATH, {"prompt": "a\0b", "max_tokens": 1}), {200}),
    "100,000 keys": (bodies(PATH, {"prompt": "a", "configuration": {f"{i}": 1 for i in range(70_000)}}), {400}),
    "one key, many times": (bodies(PATH, b'{"model":"m","prompt":"a",' + b'"a":1,' * 100_000 + b'"b":1}'), {400}),
    "4,000 patterns": (
        bodies(PATH, {"prompt": "a", "configuration": {"patterns": {f"*{i}*": "int8" for i in range(4000)}}}),
        {400},
    ),
    "a regular expression": (
        bodies(PATH, {"prompt": "a", "configuration": {"patterns": {"(.*)*(.*)*(.*)*x": "int8"}, "default": "int8"}}),
        {400},
    ),
    "a glob of stars": (
        bodies(
            PATH,
            {"prompt": "a", "configuration": {"patterns": {"*o" * 4000 + "!": "int8"}}},
            {"prompt": "a", "configuration": {"patterns": {"[" * 8000: "int8"}}},
        ),
        {400},
    ),
    "300 configurations": (bodies(PATH, *_CONFIGURATIONS), {200, 400}),
    "200 requests side by side": (many(200, post({"prompt": "a", "max_tokens": 90})), {200, 503}),
    "600 connections that do nothing": (many(600, b"", read=False), {0}),
    "1,000 connections opened and closed": (churn, {0}),
}
