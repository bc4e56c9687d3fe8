"""examples/service under load on loopback: errors, wrong tokens, latencies, memory.

python benchmarks/cpp_service.py BUNDLE [--seconds 60] [--clients 8]
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
PROMPTS = ["Once upon a time", "The president said", "日本 and other", "A list:\n1. ", "It is"]
CONFIGURATIONS: list[dict[str, Any]] = [{"default": "int8"}, {"default": "int4-g64"}, {"default": "nf3-g64"}]
TOKENS = 16


def post(connection: HTTPConnection, path: str, value: Any) -> tuple[int, str]:
    """Return status and body."""
    connection.request("POST", path, json.dumps(value), {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, response.read().decode()


def ask(connection: HTTPConnection, prompt: str, configuration: Any, stream: bool) -> tuple[list[int], str, float]:
    """Return tokens, text and seconds to the first token."""
    request = {"prompt": prompt, "max_tokens": TOKENS, "configuration": configuration, "stream": stream}
    if not stream:
        status, body = post(connection, "/generate", request)
        assert status == 200, body
        answer = json.loads(body)
        return answer["tokens"], answer["text"], 0.0
    start, first, streamed = time.perf_counter(), 0.0, ""
    connection.request("POST", "/generate", json.dumps(request), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    last: dict[str, Any] = {}
    tokens = []
    for line in response:
        if not line.startswith(b"data: "):
            continue
        last = json.loads(line[6:])
        if "token" in last:
            first = first or time.perf_counter() - start
            tokens.append(last["token"])
            streamed += last["text"]
    assert last.get("done") and last["tokens"] == tokens, last
    assert last["text"].startswith(streamed), last
    return tokens, last["text"], first


class Load:
    """Clients that request random prompts and configurations and compare the tokens with those of an idle service."""

    def __init__(self, expected: dict[tuple[str, int], list[int]], until: float) -> None:
        self.expected, self.until, self.lock = expected, until, threading.Lock()
        self.seconds: list[float] = []
        self.first: list[float] = []
        self.errors: list[str] = []
        self.wrong = 0

    def client(self, seed: int) -> None:
        """Send requests until the time is over."""
        rng, connection = random.Random(seed), HTTPConnection("127.0.0.1", PORT, timeout=120)
        while time.perf_counter() < self.until:
            prompt, which, stream = rng.choice(PROMPTS), rng.randrange(len(CONFIGURATIONS)), rng.random() < 0.7
            start = time.perf_counter()
            try:
                tokens, _, first = ask(connection, prompt, CONFIGURATIONS[which], stream)
            except (AssertionError, OSError, ValueError) as error:
                with self.lock:
                    self.errors.append(repr(error)[:200])
                connection.close()
                continue
            with self.lock:
                self.seconds.append(time.perf_counter() - start)
                self.wrong += tokens != self.expected[prompt, which]
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
    arguments = parser.parse_args()
    library = call(sys.executable, "-m", "coatrt", "cmake-dir", "--onnxruntime").strip()
    with tempfile.TemporaryDirectory() as name:
        program = build(Path(name), "examples/service")["service"]
        command = [str(program), str(arguments.bundle), "--port", str(PORT), "--sessions", "2", "--context", "128"]
        service = subprocess.Popen(
            command, env={**os.environ, "COATRT_ONNXRUNTIME": library}, stderr=subprocess.PIPE, text=True
        )
        try:
            assert service.stderr is not None
            line = service.stderr.readline()
            assert line.startswith("listening"), line
            result = load(service.pid, arguments.clients, arguments.seconds)
        finally:
            service.send_signal(signal.SIGTERM)
            code = service.wait(60)
    result["exit_code"] = code
    save_result("cpp_service", "python benchmarks/cpp_service.py BUNDLE", result)


def load(pid: int, clients: int, seconds: float) -> dict[str, Any]:
    """Return the result of a load of `clients` for `seconds`."""
    connection, expected = HTTPConnection("127.0.0.1", PORT, timeout=120), {}
    for prompt in PROMPTS:
        for which, configuration in enumerate(CONFIGURATIONS):
            expected[prompt, which] = ask(connection, prompt, configuration, False)[0]
    allowed_tokens = [{tuple(expected[prompt, which]) for which in range(len(CONFIGURATIONS))} for prompt in PROMPTS]
    differ = sum(len(answers) > 1 for answers in allowed_tokens)
    assert differ, "configurations must give different tokens, or the comparison shows nothing"
    for path, value in (
        ("/generate", "{"),
        ("/generate", {}),
        ("/generate", {"prompt": "a", "max_tokens": 0}),
        ("/configuration", {"default": "int5"}),
        ("/generate", {"tokens": [10**9]}),
    ):
        status, body = post(connection, path, value)
        assert status == 400 and "error" in json.loads(body), body
    swaps = [json.loads(post(connection, "/configuration", value)[1]) for value in CONFIGURATIONS]
    assert len({swap["configuration"] for swap in swaps}) == len(CONFIGURATIONS)
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
        "sessions": 2,
        "tokens_per_request": TOKENS,
        "requests": len(running.seconds),
        "requests_counted_by_metrics": counted,
        "errors": running.errors,
        "wrong": running.wrong,
        "prompts_whose_tokens_tell_configurations_apart": differ,
        "request": times,
        "first_token": first,
        "tokens_per_s": len(running.seconds) * TOKENS / took,
        "rss_mb": {"after_a_quarter": max(memory[:quarter]), "at_the_end": memory[-1], "most": max(memory)},
    }


if __name__ == "__main__":
    main()
