"""The C++ service under attack: /health answers, SIGTERM ends it, tokens stay right."""

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from coatrt.bundle import Bundle, seal
from support.cpp_service import Service

ROOT = Path(__file__).resolve().parents[2]


def test_slow_clients_do_not_keep_health_from_answering(cpp: Any, tiny_bundle: Path) -> None:
    """The deadline is for the whole request: each of these sends a byte before any read could time out."""
    service = Service(cpp, tiny_bundle, "--sessions", "1", "--queue", "2", "--deadline", "2")
    try:
        opened = [socket.create_connection(("127.0.0.1", service.port), timeout=10) for _ in range(200)]
        started = time.monotonic()
        for connection in opened:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1000\r\n\r\n")
        worst = 0.0
        while time.monotonic() - started < 1.5:
            for connection in opened:
                connection.sendall(b" ")
            asked = time.monotonic()
            assert service.ask("GET", "/health")[0] == service.ask("GET", "/metrics")[0] == 200
            worst = max(worst, time.monotonic() - asked)
            time.sleep(0.2)
        assert worst < 1, worst
        for connection in opened:
            assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
            connection.close()
        assert 1.9 < time.monotonic() - started < 5
    finally:
        service.stop()


def test_sigterm_ends_the_service_whatever_it_does(cpp: Any, tiny_bundle: Path) -> None:
    service = Service(cpp, tiny_bundle, "--sessions", "1", "--queue", "4")
    request = {"prompt": "the cat sat", "max_tokens": 80, "stream": True}
    clients = [service.begin(**request) for _ in range(5)]  # one runs, four wait; none is read
    slow = socket.create_connection(("127.0.0.1", service.port))
    slow.sendall(b"GET /health HTTP/1.1\r\n")
    started = time.monotonic()
    service.stop()
    assert time.monotonic() - started < 5
    for connection in (*clients, slow):
        connection.close()


def test_sigterm_ends_a_service_that_answers_to_nobody(cpp: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    """A tokenizer whose pattern takes many steps on this prompt stands for whatever cannot be cancelled."""
    directory = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    tokenizer = json.loads((directory / "tokenizer" / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "a*a*a*a*b"}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    (directory / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer))
    manifest = Bundle.open(tiny_bundle).manifest
    seal(directory, {key: value for key, value in manifest.items() if key not in ("format", "coatrt", "files")})
    service = Service(cpp, directory, "--sessions", "1")
    connection = service.begin(prompt="a" * 1_000_000)
    time.sleep(0.3)
    assert service.metric("coatrt_requests_waiting") == 1
    started = time.monotonic()
    service.stop()
    assert time.monotonic() - started < 5
    connection.close()


def test_patterns_are_tried_in_the_order_of_the_request(cpp: Any, tiny_bundle: Path) -> None:
    service = Service(cpp, tiny_bundle)
    try:
        answers = [
            service.complete(prompt="a", max_tokens=1, configuration={"patterns": patterns, "default": "int8"})
            for patterns in ({"*_proj": "nf3-g32", "*.[qkv]*": "fp8"}, {"*.[qkv]*": "fp8", "*_proj": "nf3-g32"})
        ]
        assert answers[0]["logprobs"]["token_logprobs"] != answers[1]["logprobs"]["token_logprobs"]
    finally:
        service.stop()


@pytest.mark.slow
def test_a_short_campaign(cpp: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    """tests/campaigns/service.py: more than 60 attacks while /health is asked, SIGTERM amid them, tokens under load."""
    command = [sys.executable, ROOT / "tests" / "campaigns" / "service.py", tiny_bundle, "-o", tmp_path / "result.json"]
    options = ["--program", cpp.directory / "service", "--seconds", "3", "--hold", "3", "--deadline", "2"]
    done = subprocess.run(
        list(map(str, [*command, *options])), env=cpp.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["attacks"] >= 60
    assert result["unexpected_answers"] == {} and result["wrong_tokens_after"] == []
    assert result["health"]["failures"] == [] and result["health"]["worst_seconds"] < 1
    for ended in (result["sigterm"], result["sigterm_after_load"]):
        assert ended["exit_code"] == 0 and ended["seconds"] < 5, ended
    assert result["load"]["wrong_count"] == 0 and result["load"]["requests"] > 0
