"""The C++ examples: minimal, built as the documents say against the package as pip installs it, and the service."""

import json
import signal
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from coatrt.bundle import Bundle
from support.cpp_service import Service

ROOT = Path(__file__).resolve().parents[2]


def documented_commands() -> list[str]:
    """Return the two commands with which a document builds examples/minimal."""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        lines = [line.strip().split("  #")[0] for line in path.read_text(encoding="utf-8").splitlines()]
        commands = [line for line in lines if line.startswith("cmake ") and "build/minimal" in line]
        if commands:
            assert [command.split()[1] for command in commands] == ["-S", "--build"], path
            return commands
    raise AssertionError("no document builds examples/minimal")


@pytest.mark.slow
def test_minimal_says_what_coatrt_run_says(cpp: Any, headers: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    assert len((ROOT / "examples/minimal/main.cpp").read_text().splitlines()) <= 40
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(tmp_path / "p"),
        str(ROOT),
    ]
    if subprocess.run(install, check=False, capture_output=True).returncode:
        pytest.skip("pip cannot install here: it needs the network for setuptools")

    def shell(command: str) -> str:
        path = f"{tmp_path / 'p' / 'bin'}:{cpp.environment.get('PATH', '')}"
        own = {"PYTHONPATH": str(tmp_path / "p"), "PATH": path, "CMAKE_PREFIX_PATH": str(headers.parent)}
        environment = {**cpp.environment, **own}
        done = subprocess.run(
            command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout

    for command in documented_commands():
        shell(command.replace("build/minimal", str(tmp_path / "build")))
    cache = (tmp_path / "build/CMakeCache.txt").read_text()
    assert f"coatrt_DIR:UNINITIALIZED={tmp_path}/p/" in cache or f"coatrt_DIR:PATH={tmp_path}/p/" in cache
    text = "the cat sat é"
    expected = shell(f"coatrt run {tiny_bundle} -p '{text}' --context 96")
    assert shell(f"{tmp_path}/build/minimal {tiny_bundle} '{text}'") == expected


def telling_prompt(service: Service, configurations: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    """Return a request whose greedy tokens tell two configurations apart, and the answers to it."""
    for text in ("the cat sat", "the owl", "a hen", "mat", "x", "cat. dog.", "owl fox bee", "the dog saw"):
        prompt = {"prompt": text, "max_tokens": 40}
        answers = [service.generate(**prompt, configuration=value) for value in configurations]
        if answers[0]["tokens"] != answers[1]["tokens"]:
            return prompt, answers
    raise AssertionError("no prompt tells the configurations apart")


REFUSED: tuple[tuple[Any, str], ...] = (
    (
        "{",
        'the request is not JSON (line 1, byte 2: it ends too early); send an object like {"prompt": "Once"}',
    ),
    ("", "(line 1, byte 1: it ends too early)"),
    ('{\n"prompt": Once}', "(line 2, byte 13: unexpected 'O' after "),
    ('{"prompt": "a"} x', "(line 1, byte 17: unexpected 'x' after "),
    ('{"prompt": "a\nb"}', "(line 1, byte 14: unexpected '?' after "),
    (r'{"prompt": "\ud800"}', r"""(line 1, byte 19: unexpected '"' after '"""),
    ('{"prompt": "a", "temperature": 1e999}', "(line 1, byte 36: the number '1e999' is outside the range of float64)"),
    ([], "the request must be an object"),
    (
        {"prompt": "a", "max_token": 3},
        'the request has the unknown key "max_token"; allowed: prompt, tokens, max_tokens, temperature, top_k, '
        "top_p, seed, configuration, stream",
    ),
    ({"prompt": "a", "Stream": True}, 'the unknown key "Stream"; allowed: '),
    ({"prompt": "a", "": 1}, 'the unknown key ""; allowed: '),
    ({"prompt": "a", "x" * 900: 1}, 'the unknown key "' + "x" * 39 + "; allowed: "),
    ({"prompt": "a", "configuration": {"default": "int8", "pattern": {}}}, "has the keys default, matrices, patterns"),
    ({"prompt": "a", "tokens": [1]}, "both prompt and tokens; give one"),
    ('{"prompt": "a", "prompt": "b"}', "the request gives the key 'prompt' twice in one object; give it once"),
    ('{"prompt": "a", "stream": true, "stream": true}', "gives the key 'stream' twice"),
    ('{"prompt": "a", "configuration": {"default": "int8", "default": "int8"}}', "gives the key 'default' twice"),
    (
        '{"prompt": "a", "configuration": {"patterns": {"*": "int8", "*": "fp8"}}}',
        "gives the key '*' twice in one object",
    ),
    ({}, "neither prompt nor tokens"),
    ({"prompt": 3}, "prompt must be a text"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens must be a whole number from 1 to 2^63 - 1, got -1"),
    ({"tokens": [99999]}, "outside the vocabulary"),
    ({"prompt": ""}, "empty prompt"),
    (
        {"prompt": "a" * 200},
        "the prompt has 200 tokens and the service runs with --context 96; shorten it, or have the service started "
        "with more",
    ),
    ({"tokens": [1] * 97}, "the prompt has 97 tokens and the service runs with --context 96"),
    ({"prompt": "a", "temperature": -1}, "temperature must be 0 or a positive number, got -1"),
    ({"prompt": "a", "configuration": {"default": "int5"}}, "no weight format"),
    ({"prompt": "a", "configuration": {"patterns": {"(.*)*x": "int8"}, "default": "int8"}}, "patterns are globs"),
    ({"prompt": "a", "configuration": {"patterns": {"*" * 9000: "int8"}}}, "more than 8192 characters"),
    (
        {"prompt": "a", "configuration": {"matrices": dict.fromkeys(map(str, range(6000)), "int8")}},
        "more than 5000 keys",
    ),
    ('{"prompt": "a", "configuration": ' + "[" * 400_000 + "]" * 400_000 + "}", "nested deeper than 32 levels"),
    ("[" * 1_000_000, "nested deeper than 32 levels"),
)


def test_the_service(cpp: Any, tiny_bundle: Path) -> None:
    service = Service(cpp, tiny_bundle, "--sessions", "2", "--queue", "8")
    try:
        status, body = service.ask("GET", "/health")
        assert (status, json.loads(body)) == (
            200,
            {"status": "ok", "configuration": Bundle.open(tiny_bundle).config.hash},
        )
        configurations = [{"default": "int8"}, {"default": "nf3-g32"}]
        prompt, expected = telling_prompt(service, configurations)

        status, body = service.ask("POST", "/generate", {**prompt, "stream": True, "configuration": configurations[1]})
        events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: ")]
        assert status == 200
        assert events[-1] == expected[1] | {"done": True}
        assert [event["token"] for event in events[:-1]] == expected[1]["tokens"]

        answer = json.loads(service.ask("POST", "/configuration", configurations[1])[1])
        assert answer["configuration"] == expected[1]["configuration"]
        assert service.generate(**prompt) == expected[1]

        wrong: list[Any] = []

        def client(seed: int) -> None:
            for turn in range(6):
                which = (seed + turn) % 2
                if service.generate(**prompt, configuration=configurations[which]) != expected[which]:
                    wrong.append((seed, turn))

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

        for value, message in REFUSED:
            status, body = service.ask("POST", "/generate", value)
            assert status == 400 and message in json.loads(body)["error"], (value, body)
        assert service.ask("GET", "/nothing")[0] == 404
        for value, message in (
            ('{"default": "int8"', 'it ends too early); send an object like {"default": "int8"}'),
            ('{"default": "int8", "default": "fp8"}', "the request gives the key 'default' twice"),
            ({"default": "int8", "formats": {}}, "holds default, formats; a configuration has the keys"),
        ):
            status, body = service.ask("POST", "/configuration", value)
            assert status == 400 and message in json.loads(body)["error"], (value, body)
        status, body = service.ask("POST", "/generate?stream=true", {"prompt": "a"})
        assert status == 400 and "the path has a query, which is not read" in body
        assert service.ask("GET", "/health?now")[0] == 200  # what some probes add

        connection = HTTPConnection("127.0.0.1", service.port, timeout=60)  # a client that goes away
        connection.request("POST", "/generate", json.dumps({**prompt, "max_tokens": 80, "stream": True}))
        connection.getresponse().read(10)
        connection.close()
        assert service.generate(**prompt) == expected[1]
        metrics = service.ask("GET", "/metrics")[1]
        assert f'coatrt_requests_total{{status="400"}} {len(REFUSED) + 3}' in metrics
        assert "coatrt_swap_seconds_count" in metrics
    finally:
        service.stop()


def test_a_prompt_too_long_for_the_bundle_says_so(cpp: Any, tiny_bundle: Path) -> None:
    service = Service(cpp, tiny_bundle, "--sessions", "1", "--context", "100000")
    try:
        status, body = service.ask("POST", "/generate", {"tokens": [1] * 8193})
        said = "the prompt has 8193 tokens and the bundle was built for 8192; shorten it, or have it built with more"
        assert (status, json.loads(body)["error"]) == (400, f"{said} (--context)")
    finally:
        service.stop()


def test_a_client_that_goes_away_ends_its_generation(cpp: Any, tiny_bundle: Path) -> None:
    service = Service(cpp, tiny_bundle, "--sessions", "1", "--context", "500")
    try:
        for stream in (False, True):
            connection = HTTPConnection("127.0.0.1", service.port, timeout=60)
            request = {"prompt": "the cat sat", "max_tokens": 480, "stream": stream}
            connection.request("POST", "/generate", json.dumps(request))
            connection.close()
        assert len(service.generate(prompt="a", max_tokens=1)["tokens"]) == 1  # behind both on the one session
        metrics = service.ask("GET", "/metrics")[1]
        (made,) = (int(line.split()[1]) for line in metrics.splitlines() if line.startswith("coatrt_tokens_total "))
        assert made < 480, made
    finally:
        service.stop()


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the signals that a process blocks")
def test_the_service_ends_where_it_is_told_to_while_loading(cpp: Any, tiny_bundle: Path) -> None:
    service = Service(cpp, tiny_bundle, "--sessions", "8", wait=False)
    status = Path(f"/proc/{service.process.pid}/status")
    deadline = time.monotonic() + 60
    blocked = 0
    while not blocked >> (signal.SIGTERM - 1) & 1 and time.monotonic() < deadline:
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("SigBlk"))
        blocked = int(line.split()[1], 16)
    service.process.send_signal(signal.SIGTERM)
    try:
        _, said = service.process.communicate(timeout=60)
    finally:
        service.process.kill()
    assert service.process.returncode == 0, said


def test_the_service_refuses_in_one_line(cpp: Any, tmp_path: Path) -> None:
    for arguments, message in (
        ([tmp_path], "not a bundle: "),
        ([], "usage: service BUNDLE"),
        ([tmp_path, "--port", "x"], "--port must be a whole number from 0 to 65535, got x"),
        ([tmp_path, "--port", "80x"], "got 80x"),
        ([tmp_path, "--port", "99999"], "got 99999"),
        ([tmp_path, "--sessions", "-1"], "--sessions must be a whole number from 1 to 1024, got -1"),
        ([tmp_path, "--context", "0"], "--context must be a whole number from 1 "),
        ([tmp_path, "--deadline", "1.5"], "--deadline must be a whole number from 1 to 3600, got 1.5"),
        ([tmp_path, "--queue", "1", "--queue", "2"], "--queue is given twice"),
        ([tmp_path, tmp_path], "two bundles are given"),
        ([tmp_path, "--colour", "1"], "--colour is no option"),
        ([tmp_path, "--port"], "--port has no value"),
    ):
        done = cpp.run("service", *arguments)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert message in line
