"""Starts the two servers that speak OpenAI's protocol, and talks to them."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["KEY", "KINDS", "Server", "start_server"]

KEY = "a-secret-of-the-tests"
KINDS = ("python", "cpp")


class Server:
    """A server that answers.

    Args:
        url: where, without /v1.
        key: its API key.
        model: the name of its bundle.
        process: the process, if it is ours to stop.
    """

    def __init__(self, url: str, key: str, model: str, process: "subprocess.Popen[str] | None" = None) -> None:
        self.url, self.key, self.model, self.process = url, key, model, process

    @functools.cached_property
    def client(self) -> Any:
        """OpenAI's client."""
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=120)

    @functools.cached_property
    def http(self) -> Any:
        import httpx2

        return httpx2.Client(base_url=self.url, timeout=120, headers={"Authorization": f"Bearer {self.key}"})

    def post(self, path: str, body: Any, **options: Any) -> Any:
        """Return the response to a POST of a value as JSON, or of bytes as they are."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **options.pop("headers", {})}
        return self.http.post(path, content=content, headers=headers, **options)

    def complete(self, prompt: Any, **fields: Any) -> Any:
        """Return the answer of /v1/completions as data."""
        response = self.post("/v1/completions", {"model": self.model, "prompt": prompt, **fields})
        assert response.status_code == 200, response.text
        return response.json()

    def chat(self, content: Any, **fields: Any) -> Any:
        """Return the answer of /v1/chat/completions to one message of a user as data."""
        messages = [{"role": "user", "content": content}]
        response = self.post("/v1/chat/completions", {"model": self.model, "messages": messages, **fields})
        assert response.status_code == 200, response.text
        return response.json()

    def refusal(self, path: str, body: Any, status: int = 400) -> dict[str, Any]:
        """Return the error of a request that must be refused with `status`."""
        response = self.post(path, body)
        assert response.status_code == status, (response.status_code, response.text[:500])
        value = response.json()
        assert set(value) == {"error"} and set(value["error"]) == {"message", "type", "param", "code"}
        assert isinstance(value["error"]["message"], str) and value["error"]["message"]
        error: dict[str, Any] = value["error"]
        return error

    def events(self, path: str, body: Any) -> Iterator[Any]:
        """Yield the events of a stream as data, [DONE] as a text."""
        headers = {"Content-Type": "application/json"}
        with self.http.stream("POST", path, content=json.dumps(body).encode(), headers=headers) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            for line in response.iter_lines():
                if line:
                    assert line.startswith("data: "), line
                    yield line[6:] if line == "data: [DONE]" else json.loads(line[6:])

    def metric(self, name: str) -> float:
        """Return a value of /metrics, summed over its labels."""
        text = self.http.get("/metrics").text
        found = re.findall(rf"^{name}(?:\{{[^}}]*\}})? ([0-9.e+-]+)$", text, re.MULTILINE)
        assert found, text
        return sum(map(float, found))

    def stop(self) -> str:
        """End the process with SIGTERM and return what it has printed."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, errors[-3000:]
        return errors


def start_server(kind: str, cpp: Any, bundle: Path, *options: str, parallel: int = 4) -> Server:
    """Start a server.

    Args:
        kind: "python" for `coatrt serve`, "cpp" for the C++ service.
        cpp: the compiled C++ programs, for the C++ service.
        bundle: what it serves.
        options: further options, which both servers know.
        parallel: sequences that run at once.
    """
    common = [str(bundle), "--port", "0", "--api-key", KEY, *options]
    if kind == "cpp":
        command = [str(cpp.directory / "service"), *common, "--sessions", str(parallel)]
        environment = cpp.environment
    else:
        command = [sys.executable, "-m", "coatrt", "serve", *common, "--batch", str(parallel), "--threads", "1"]
        environment = dict(os.environ)
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = process.stderr.readline()
    if not line.startswith("listening on "):
        process.kill()
        raise AssertionError(line + process.stderr.read())
    port = int(line.rsplit(":", 1)[1])
    return Server(f"http://127.0.0.1:{port}", KEY, bundle.name, process)
