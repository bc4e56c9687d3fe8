"""Attack the service, ask it for /health all the while, end it, then compare tokens under load.

python tests/campaigns/service.py BUNDLE -o RESULT.json [--seconds 60] [--attacks N] [--hold 15] [--sanitize]
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from attacks import LONG, MODEL, PATH, QUICK, post
from slow_clients import SLOW, Slow

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["the cat sat", "the owl", "a hen", "Once upon a time", "it is"]
CONFIGURATIONS: list[Any] = [{"default": "int8"}, None]
TOKENS = 16


class Running:
    """The service, started."""

    def __init__(self, program: Path, bundle: Path, deadline: int) -> None:
        options = ["--name", MODEL, "--port", "0", "--sessions", "2", "--queue", "8", "--context", "128"]
        options += ["--deadline", str(deadline)]
        self.process = subprocess.Popen([str(program), str(bundle), *options], stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        assert line.startswith("listening"), line + self.process.stderr.read()
        self.port = int(line.rsplit(":", 1)[1])

    def ask(self, method: str, path: str, value: Any = None, timeout: float = 120) -> tuple[int, bytes]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            headers = {} if value is None else {"Content-Type": "application/json"}
            connection.request(method, path, None if value is None else json.dumps(value), headers)
            response = connection.getresponse()
            return response.status, response.read()

    def tokens(self, prompt: str, which: int) -> tuple[int, Any]:
        """Return the status, and the tokens with their log probabilities; a full queue is asked again."""
        request: dict[str, Any] = {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": TOKENS,
            "temperature": 0,
            "logprobs": 0,
        }
        if CONFIGURATIONS[which] is not None:
            request["configuration"] = CONFIGURATIONS[which]
        while True:
            status, body = self.ask("POST", PATH, request)
            if status != 503:
                return status, json.loads(body).get("choices")
            time.sleep(0.05)

    def memory_mb(self) -> float:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1e3

    def end(self) -> dict[str, Any]:
        """Tell it to end; return the seconds that took, its exit code and what it said."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            _, said = self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            _, said = self.process.communicate()
        return {"seconds": time.monotonic() - started, "exit_code": self.process.returncode, "said": said[-2000:]}


class Prober:
    """Asks for /health, and every tenth time for /metrics, every 100 ms, each time on a new connection."""

    def __init__(self, service: Running) -> None:
        self.service, self.seconds, self.failures = service, list[float](), list[str]()
        self.during, self.worst = "", ("", 0.0)
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        while not self.over.wait(0.1):
            during, started = self.during, time.monotonic()
            path = "/metrics" if len(self.seconds) % 10 == 9 else "/health"
            try:
                status, _ = self.service.ask("GET", path, timeout=10)
                assert status == 200, status
            except (OSError, AssertionError, ValueError) as error:
                self.failures.append(f"{during}: {error!r}")
            self.seconds.append(time.monotonic() - started)
            if self.seconds[-1] > self.worst[1]:
                self.worst = (during, self.seconds[-1])

    def end(self) -> dict[str, Any]:
        self.over.set()
        self.thread.join()
        return {
            "probes": len(self.seconds),
            "failures": self.failures,
            "worst_seconds": max(self.seconds),
            "worst_during": self.worst[0],
            "median_seconds": sorted(self.seconds)[len(self.seconds) // 2],
        }


def attack(service: Running, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run every attack; the slow ones beside the quick ones, and once more alone."""
    expected = [(prompt, which, service.tokens(prompt, which)) for prompt in PROMPTS for which in (0, 1)]
    prober = Prober(service)
    unexpected: dict[str, list[int]] = {}
    wrong: list[str] = []
    lasted: dict[str, float] = {}

    def hold(name: str, slow: Slow, until: float) -> None:
        lasted[name] = max(lasted.get(name, 0.0), *slow.hold(service.port, until))

    def start(until: float) -> list[threading.Thread]:
        threads = [threading.Thread(target=hold, args=(name, slow, until), daemon=True) for name, slow in SLOW.items()]
        for thread in threads:
            thread.start()
        return threads

    quick = list(QUICK.items())[: arguments.attacks]
    beside = start(time.monotonic() + arguments.hold)
    for number, (name, (run, allowed)) in enumerate(quick):
        prober.during = name
        started = time.monotonic()
        found = run(service.port)
        print(f"{name}: {time.monotonic() - started:.2f} s, {sorted(set(found))}", flush=True)
        if not set(found) <= allowed:
            unexpected[name] = sorted(set(found) - allowed)
        prompt, which, answer = expected[number % len(expected)]
        if service.tokens(prompt, which) != answer:
            wrong.append(name)
    for thread in beside:
        thread.join()
    prober.during = "slow clients"
    for thread in start(time.monotonic() + arguments.hold):
        thread.join()
    return {
        "attacks": len(quick) + len(SLOW),
        "slow_connections": sum(slow.count for slow in SLOW.values()),
        "unexpected_answers": unexpected,
        "wrong_tokens_after": wrong,
        "seconds_that_slow_connections_lasted": lasted,
        "health": prober.end(),
        "memory_mb": service.memory_mb(),
    }


def end_under_attack(service: Running, arguments: argparse.Namespace) -> dict[str, Any]:
    """SIGTERM while requests run and wait, and slow clients and clients that read nothing are there."""
    until = time.monotonic() + 4
    held = [*SLOW.values(), Slow(12, LONG, receive=1024), Slow(10, post({"prompt": "a" * 20, "max_tokens": 100}))]
    threads = [threading.Thread(target=slow.hold, args=(service.port, until)) for slow in held]
    for thread in threads:
        thread.start()
    time.sleep(1.5)
    ended = service.end()
    for thread in threads:
        thread.join()
    return ended


def load(service: Running, seconds: float, clients: int) -> dict[str, Any]:
    """Compare every token of so many clients for so long with what the quiet service said."""
    expected = {(prompt, which): service.tokens(prompt, which) for prompt in PROMPTS for which in (0, 1)}
    until, done, wrong = time.monotonic() + seconds, list[int](), list[Any]()

    def client(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < until:
            prompt, which = rng.choice(PROMPTS), rng.randrange(2)
            found = service.tokens(prompt, which)
            done.append(1)
            if found != expected[prompt, which]:
                wrong.append([prompt, which, found])

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "clients": clients,
        "seconds": seconds,
        "requests": len(done),
        "wrong": wrong[:10],
        "wrong_count": len(wrong),
    }


def built(sanitize: bool) -> Path:
    """Compile the service; with sanitizers where the compiler has them."""
    directory = ROOT / "build" / ("campaign-sanitized" if sanitize else "campaign")
    flags = [f"-DCMAKE_PREFIX_PATH={ROOT / 'build' / 'deps'}", f"-DSANITIZE={'ON' if sanitize else 'OFF'}"]
    for command in (
        ["cmake", "-S", str(ROOT / "tests" / "engines" / "cpp"), "-B", str(directory), *flags],
        ["cmake", "--build", str(directory), "--parallel", "2", "--target", "service"],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return directory / "service"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="where the result goes, as JSON")
    parser.add_argument("--seconds", type=float, default=60, help="of the load at the end")
    parser.add_argument("--attacks", type=int, help="run the first so many quick ones only")
    parser.add_argument("--hold", type=float, default=15, help="seconds that slow clients stay")
    parser.add_argument("--deadline", type=int, default=10, help="of the service, in seconds")
    parser.add_argument("--sanitize", action="store_true", help="AddressSanitizer and UndefinedBehaviorSanitizer")
    parser.add_argument("--program", type=Path, help="a compiled service, instead of compiling one")
    arguments = parser.parse_args()
    program = arguments.program or built(arguments.sanitize)
    if "COATRT_ONNXRUNTIME" not in os.environ:
        command = [sys.executable, "-m", "coatrt", "cmake-dir", "--onnxruntime"]
        os.environ["COATRT_ONNXRUNTIME"] = subprocess.check_output(command, text=True).strip()
    if arguments.sanitize and "LSAN_OPTIONS" not in os.environ:
        suppressions = program.parent / "lsan.txt"
        suppressions.write_text("leak:libonnxruntime\n")  # ONNX Runtime keeps what it made at start
        os.environ["LSAN_OPTIONS"] = f"suppressions={suppressions}"
    service = Running(program, arguments.bundle, arguments.deadline)
    try:
        result = {"sanitized": bool(arguments.sanitize), "deadline_s": arguments.deadline, **attack(service, arguments)}
        result["sigterm"] = end_under_attack(service, arguments)
    finally:
        service.process.kill()
    service = Running(program, arguments.bundle, arguments.deadline)
    try:
        result["load"] = load(service, arguments.seconds, 8)
        result["sigterm_after_load"] = service.end()
    finally:
        service.process.kill()
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
