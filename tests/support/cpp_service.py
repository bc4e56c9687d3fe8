"""Starts the C++ service of examples/service and talks to it."""

import json
import signal
import subprocess
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

__all__ = ["Service", "body"]

_JSON = {"Content-Type": "application/json"}


class Service:
    """A running service."""

    def __init__(self, cpp: Any, bundle: Path, *options: str, wait: bool = True) -> None:
        context = () if "--context" in options else ("--context", "96")
        command = [str(cpp.directory / "service"), str(bundle), "--name", "m", "--port", "0", *context, *options]
        self.process = subprocess.Popen(command, env=cpp.environment, stderr=subprocess.PIPE, text=True)
        if not wait:
            return
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        assert line.startswith("listening on http://"), line
        self.port = int(line.rsplit(":", 1)[1])

    def begin(self, **request: Any) -> HTTPConnection:
        """Send a request for a completion and return the connection."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("POST", "/v1/completions", json.dumps(body(**request)), _JSON)
        return connection

    def ask(self, method: str, path: str, value: Any = None) -> tuple[int, str]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        content = None if value is None else value if isinstance(value, str) else json.dumps(value)
        connection.request(method, path, content, {} if content is None else _JSON)
        response = connection.getresponse()
        answer = response.status, response.read().decode()
        connection.close()
        return answer

    def complete(self, **request: Any) -> Any:
        """Return the only choice of a completion: text, tokens and log probabilities."""
        status, answer = self.ask("POST", "/v1/completions", body(**request))
        assert status == 200, answer
        (choice,) = json.loads(answer)["choices"]
        return choice

    def refusal(self, value: Any, path: str = "/v1/completions") -> Any:
        """Return the error of a request that is refused with 400."""
        status, answer = self.ask("POST", path, value)
        assert status == 400, (status, answer)
        return json.loads(answer)["error"]

    def metric(self, name: str) -> float:
        text = self.ask("GET", "/metrics")[1]
        return sum(float(line.split()[1]) for line in text.splitlines() if line.split("{")[0].split(" ")[0] == name)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, errors[-3000:]  # a leak found by the sanitizer fails it too


def body(**request: Any) -> dict[str, Any]:
    """Return a request for the likeliest tokens, whatever they are, with their log probabilities."""
    return {"model": "m", "temperature": 0, "logprobs": 0, "ignore_eos": True, **request}
