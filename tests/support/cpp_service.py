"""Starts the C++ service of examples/service and talks to it."""

import json
import signal
import subprocess
from http.client import HTTPConnection
from pathlib import Path
from typing import Any


class Service:
    """A running service."""

    def __init__(self, cpp: Any, bundle: Path, *options: str, wait: bool = True) -> None:
        context = () if "--context" in options else ("--context", "96")
        command = [str(cpp.directory / "service"), str(bundle), "--port", "0", *context, *options]
        self.process = subprocess.Popen(command, env=cpp.environment, stderr=subprocess.PIPE, text=True)
        if not wait:
            return
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        assert line.startswith("listening"), line
        self.port = int(line.rsplit(":", 1)[1])

    def ask(self, method: str, path: str, value: Any = None) -> tuple[int, str]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request(
            method, path, None if value is None else value if isinstance(value, str) else json.dumps(value)
        )
        response = connection.getresponse()
        answer = response.status, response.read().decode()
        connection.close()
        return answer

    def generate(self, **request: Any) -> Any:
        status, body = self.ask("POST", "/generate", request)
        assert status == 200, body
        return json.loads(body)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, errors[-3000:]  # a leak found by the sanitizer fails it too
