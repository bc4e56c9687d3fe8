"""examples/service under load on loopback: errors, wrong answers, latencies, memory; what decoding together is worth.

python benchmarks/cpp_service.py BUNDLE [--seconds 60] [--clients 8] [--rounds 3] [--stream-tokens 64]
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
from common import save_result
from cpp_runtime import build, call

PORT = 18_473
PROMPTS = ["Once upon a time", "The president said", "日本 and other", "A list:\n1. ", "It is", "fn main() {\n", "Why?"]
CHOICES: list[dict[str, Any]] = [
    {"model": "m"},
    {"model": "m:base"},
    {"model": "m", "configuration": {"default": "int4-g64"}},
]
SESSIONS = 8
TOKENS = 16
JSON = {"Content-Type": "application/json"}

Answer = tuple[str, list[str], list[float]]
"""Text, tokens, and their log probabilities: equal answers are equal bit for bit."""


def ask(
    connection: HTTPConnection, prompt: str, choice: dict[str, Any], stream: bool = False, **more: Any
) -> tuple[Answer, float]:
    """Return an answer and the seconds to its first token."""
    request = {
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "logprobs": 0,
        "stream": stream,
        **choice,
        **more,
    }
    start, first = time.perf_counter(), 0.0
    connection.request("POST", "/v1/completions", json.dumps(request), JSON)
    response = connection.getresponse()
    if not stream:
        body = response.read()
        assert response.status == 200, body
        (whole,) = json.loads(body)["choices"]
        return (whole["text"], whole["logprobs"]["tokens"], whole["logprobs"]["token_logprobs"]), 0.0
    assert response.status == 200, response.read()
    text, tokens, logprobs, last = "", list[str](), list[float](), b""
    for line in response:
        if not line.startswith(b"data: "):
            continue
        last = line[6:].strip()
        if last == b"[DONE]":
            continue
        first = first or time.perf_counter() - start
        (part,) = json.loads(last)["choices"]
        text += part["text"]
        if part["logprobs"]:
            tokens += part["logprobs"]["tokens"]
            logprobs += part["logprobs"]["token_logprobs"]
    assert last == b"[DONE]", last
    return (text, tokens, logprobs), first


class Load:
    """Clients that request random prompts and LoRAs and compare the answers with those of an idle service."""

    def __init__(self, expected: dict[tuple[str, int], Answer], until: float) -> None:
        self.expected, self.until, self.lock = expected, until, threading.Lock()
        self.seconds: list[float] = []
        self.first: list[float] = []
        self.errors: list[str] = []
        self.wrong, self.tokens = 0, 0

    def client(self, seed: int) -> None:
        """Send requests until the time is over."""
        rng, connection = random.Random(seed), HTTPConnection("127.0.0.1", PORT, timeout=120)
        while time.perf_counter() < self.until:
            prompt, which, stream = rng.choice(PROMPTS), rng.randrange(len(CHOICES)), rng.random() < 0.7
            start = time.perf_counter()
            try:
                answer, first = ask(connection, prompt, CHOICES[which], stream)
            except (AssertionError, OSError, ValueError) as error:
                with self.lock:
                    self.errors.append(repr(error)[:200])
                connection.close()
                continue
            with self.lock:
                self.seconds.append(time.perf_counter() - start)
                self.wrong += answer != self.expected[prompt, which]
                self.tokens += len(answer[1])
                if stream:
                    self.first.append(first)


def rss(pid: int) -> float:
    """Return resident MB of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1e3


def main() -> None:
    """Start the service, load it, measure, stop it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison of streams")
    parser.add_argument("--stream-tokens", type=int, default=64, help="of each stream that is compared")
    parser.add_argument("--program", type=Path, help="a compiled service, instead of compiling one")
    arguments = parser.parse_args()
    library = call(sys.executable, "-m", "coatrt", "cmake-dir", "--onnxruntime").strip()
    with tempfile.TemporaryDirectory() as name:
        program = arguments.program or build(Path(name), "examples/service")["service"]
        options = [
            "--name",
            "m",
            "--port",
            str(PORT),
            "--sessions",
            str(SESSIONS),
            "--context",
            "256",
            "--threads",
            "1",
        ]
        command = [str(program), str(arguments.bundle), *options]
        service = subprocess.Popen(
            command, env={**os.environ, "COATRT_ONNXRUNTIME": library}, stderr=subprocess.PIPE, text=True
        )
        try:
            assert service.stderr is not None
            line = service.stderr.readline()
            assert line.startswith("listening"), line
            result = {
                "streams": streams(arguments.rounds, arguments.stream_tokens),
                **load(service.pid, arguments.clients, arguments.seconds),
            }
        finally:
            service.send_signal(signal.SIGTERM)
            code = service.wait(60)
    result["exit_code"] = code
    save_result("cpp_service", "python benchmarks/cpp_service.py BUNDLE", result)


def decode_seconds(count: int, tokens: int) -> float:
    """Return the seconds that so many streams together take for a token each, from their first tokens on."""
    spans: list[tuple[float, float]] = []

    def client(number: int) -> None:
        connection = HTTPConnection("127.0.0.1", PORT, timeout=600)
        start = time.perf_counter()
        more = {"max_tokens": tokens, "ignore_eos": True}
        answer, first = ask(connection, PROMPTS[number % len(PROMPTS)], CHOICES[0], stream=True, **more)
        assert len(answer[1]) == tokens
        spans.append((start + first, time.perf_counter()))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return (max(end for _, end in spans) - min(first for first, _ in spans)) / (tokens - 1)


def streams(rounds: int, tokens: int) -> dict[str, Any]:
    """Compare the tokens per second of 1, 2, 4 and 8 streams, measured in turn; medians."""
    counts = (1, 2, 4, SESSIONS)
    decode_seconds(1, tokens)
    times: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(rounds):
        for count in counts:
            times[count].append(decode_seconds(count, tokens))
    per_s = {str(count): count / float(np.median(times[count])) for count in counts}
    return {"tokens_each": tokens, "rounds": rounds, "tokens_per_s": per_s, "ratio": per_s[str(SESSIONS)] / per_s["1"]}


def load(pid: int, clients: int, seconds: float) -> dict[str, Any]:
    """Return the result of a load of `clients` for `seconds`."""
    connection, expected = HTTPConnection("127.0.0.1", PORT, timeout=120), dict[tuple[str, int], Answer]()
    for prompt in PROMPTS:
        for which, choice in enumerate(CHOICES):
            expected[prompt, which], _ = ask(connection, prompt, choice)
    answers = [{str(expected[prompt, which]) for which in range(len(CHOICES))} for prompt in PROMPTS]
    differ = sum(len(found) == len(CHOICES) for found in answers)
    assert differ, "LoRAs must give different answers, or the comparison shows nothing"
    running = Load(expected, time.perf_counter() + seconds)
    threads = [threading.Thread(target=running.client, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    start, memory = time.perf_counter(), []
    while any(thread.is_alive() for thread in threads):
        time.sleep(1)
        memory.append(rss(pid))
    for thread in threads:
        thread.join()
    took = time.perf_counter() - start
    connection.close()  # the service closed the connection
    connection.request("GET", "/metrics")
    metrics = connection.getresponse().read().decode()
    counted = sum(int(line.split()[-1]) for line in metrics.splitlines() if line.startswith("coatrt_requests_total"))
    quarter = max(1, len(memory) // 4)
    times = {f"p{q}_ms": 1e3 * float(np.percentile(running.seconds, q)) for q in (50, 90, 99)}
    first = {f"p{q}_ms": 1e3 * float(np.percentile(running.first, q)) for q in (50, 90, 99)}
    return {
        "clients": clients,
        "seconds": took,
        "sessions": SESSIONS,
        "tokens_per_request": TOKENS,
        "requests": len(running.seconds),
        "requests_counted_by_metrics": counted,
        "errors": running.errors,
        "wrong": running.wrong,
        "prompts_whose_answers_tell_loras_apart": differ,
        "request": times,
        "first_token": first,
        "tokens_per_s": running.tokens / took,
        "rss_mb": {"after_a_quarter": max(memory[:quarter]), "at_the_end": memory[-1], "most": max(memory)},
    }


if __name__ == "__main__":
    main()
