"""The C++ examples: minimal, built as the documents say against the package as pip installs it, and the service."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from coatrt.bundle import Bundle, seal
from support.cpp_service import Service, body

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


REFUSED: tuple[tuple[Any, str, str | None], ...] = (
    (
        "{",
        "the request is not JSON (line 1, byte 2: it ends too early); "
        'send an object like {"model": "NAME", "prompt": "Once"}',
        None,
    ),
    ("", "(line 1, byte 1: it ends too early)", None),
    ('{\n"prompt": Once}', "(line 2, byte 13: unexpected 'O' after ", None),
    ('{"prompt": "a"} x', "(line 1, byte 17: unexpected 'x' after ", None),
    ('{"prompt": "a\nb"}', "(line 1, byte 14: unexpected '?' after ", None),
    (r'{"prompt": "\ud800"}', r"""(line 1, byte 19: unexpected '"' after '""", None),
    ('{"temperature": 1e999}', "(line 1, byte 21: the number '1e999' is outside the range of float64)", None),
    ([], "the request must be an object", None),
    ({"prompt": "a", "max_token": 3}, 'the request has the unknown field "max_token"; allowed: model, ', "max_token"),
    ({"prompt": "a", "x" * 900: 1}, 'the unknown field "' + "x" * 39 + "; allowed: ", "x" * 64),
    ({"prompt": "a", "stream": True, "stream_options": {"a": 1}}, "allowed: include_usage", "stream_options.a"),
    (
        {"prompt": "a", "configuration": {"default": "int8", "pattern": {}}},
        "has the keys default, matrices, patterns",
        "configuration",
    ),
    ('{"prompt": "a", "prompt": "b"}', "the request gives the key 'prompt' twice in one object; give it once", None),
    ('{"configuration": {"default": "int8", "default": "int8"}}', "gives the key 'default' twice", None),
    ('{"configuration": {"patterns": {"*": "int8", "*": "fp8"}}}', "gives the key '*' twice in one object", None),
    ({}, "prompt is missing; give it", "prompt"),
    ({"prompt": 3}, "prompt must be a text, a list of token ids, or a list of either, got 3", "prompt"),
    ({"prompt": "a", "n": 17}, "n must be a whole number from 1 to 16, got 17", "n"),
    (
        {"prompt": [99999]},
        "prompt has token 99999; token ids are below ",
        "prompt",
    ),
    (
        {"prompt": "a" * 200, "max_tokens": 3},
        "the prompt has 200 tokens and max_tokens is 3, the service runs with --context 96; shorten them, or have the "
        "service started with more",
        "prompt",
    ),
    ({"prompt": "a", "temperature": -1}, "temperature must be a number from 0 to 2, got -1", "temperature"),
    ({"prompt": "a", "configuration": {"default": "int5"}}, "no weight format", "configuration"),
    (
        {"prompt": "a", "configuration": {"patterns": {"(.*)*x": "int8"}, "default": "int8"}},
        "patterns are globs",
        "configuration",
    ),
    (
        {"prompt": "a", "configuration": {"patterns": {"*" * 9000: "int8"}}},
        "more than 8192 characters",
        "configuration",
    ),
    (
        {"prompt": "a", "configuration": {"matrices": dict.fromkeys(map(str, range(6000)), "int8")}},
        "more than 5000 keys",
        None,
    ),
    ('{"prompt": "a", "configuration": ' + "[" * 400_000 + "]" * 400_000 + "}", "nested deeper than 32 levels", None),
    ("[" * 1_000_000, "nested deeper than 32 levels", None),
)


def test_the_service_refuses_what_is_wrong(cpp: Any, tiny_bundle: Path) -> None:
    service = Service(cpp, tiny_bundle, "--sessions", "1", "--queue", "8")
    try:
        for value, message, param in REFUSED:
            given = {"model": "m", **value} if isinstance(value, dict) else value
            error = service.refusal(given)
            assert message in error["message"], (value, error)
            assert (error["type"], error["param"]) == ("invalid_request_error", param), (value, error)
        status, answer = service.ask("POST", "/v1/completions?stream=true", {"prompt": "a"})
        assert status == 400 and "the path has a query, which is not read" in answer
        assert service.ask("GET", "/health?now")[0] == 200  # what some probes add
        assert service.ask("GET", "/nothing")[0] == 404
        assert service.ask("GET", "/v1/models/m%3Abase")[0] == 200
        assert f'coatrt_requests_total{{status="400"}} {len(REFUSED) + 1}' in service.ask("GET", "/metrics")[1]
    finally:
        service.stop()


def test_rows_go_on_with_the_conversation_that_they_hold(cpp: Any, tiny_bundle: Path) -> None:
    """What is in a row's caches is not computed again, and changes no bit of an answer."""
    mat = "the cat sat on the mat. "
    owl, other, longer = "the cat sat on the owl. ", "x" * 40, mat * 3
    service = Service(cpp, tiny_bundle, "--sessions", "2")
    try:
        fresh = {}
        for text in (mat, owl, other, longer):
            alone = Service(cpp, tiny_bundle, "--sessions", "2")
            fresh[text] = alone.complete(prompt=text, max_tokens=8)
            alone.stop()
        # 18: an even number of the 19 characters that two texts share. The last token of a prompt is always computed.
        asked = [(mat, 0), (owl, 18), (mat, 18), (other, 0), (other, 38), (owl, 18)]
        asked += [(longer, 18), (owl, 18), (longer, 70)]  # the second copies, and the long conversation stays
        for text, cached in asked:
            status, answer = service.ask("POST", "/v1/completions", body(prompt=text, max_tokens=8))
            assert status == 200, answer
            value = json.loads(answer)
            assert value["usage"]["prompt_tokens_details"]["cached_tokens"] == cached, text
            assert value["choices"][0] == fresh[text]
    finally:
        service.stop()


def test_clients_get_what_one_gets_alone(cpp: Any, tiny_bundle: Path) -> None:
    """Bit for bit: the log probabilities are compared as well, of batches that change all the time."""
    prompts = ["the cat sat", "an owl", "x", "the cat sat on the mat."]
    fields: list[dict[str, Any]] = [{}, {"configuration": {"default": "int8"}}, {"model": "m:base"}]
    service = Service(cpp, tiny_bundle, "--sessions", "4")
    try:
        cases = [{"prompt": prompt, "max_tokens": 12, **more} for prompt in prompts for more in fields]
        expected = [service.complete(**case) for case in cases]
        assert len({str(answer["logprobs"]) for answer in expected}) == len(cases)
        wrong: list[Any] = []

        def client(seed: int) -> None:
            for turn in range(6):
                which = (5 * seed + turn) % len(cases)
                if service.complete(**cases[which]) != expected[which]:
                    wrong.append((seed, turn))

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert service.metric("coatrt_cached_tokens_total") > 0
    finally:
        service.stop()


def test_a_prompt_too_long_for_the_bundle_says_so(cpp: Any, tiny_bundle: Path) -> None:
    service = Service(cpp, tiny_bundle, "--sessions", "1", "--context", "100000")
    try:
        said = (
            "the prompt has 8193 tokens and max_tokens is 16, the bundle was built for 8192; shorten them, or have it"
        )
        assert service.refusal({"model": "m", "prompt": [1] * 8193})["message"] == f"{said} built with more (--context)"
    finally:
        service.stop()


def test_a_chat_template_that_cannot_be_rendered_is_refused(cpp: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    for content, message in ((None, "the model has no chat template"), ('{"refusal": "it says why"}', "it says why")):
        directory = Path(shutil.copytree(tiny_bundle, tmp_path / str(content is None)))
        if content is None:
            (directory / "chat.json").unlink()
        else:
            (directory / "chat.json").write_text(content)
        seal(directory, {key: value for key, value in manifest.items() if key not in ("format", "coatrt", "files")})
        service = Service(cpp, directory, "--sessions", "1")
        try:
            messages = [{"role": "user", "content": "hi"}]
            error = service.refusal({"model": "m", "messages": messages}, "/v1/chat/completions")
            assert message in error["message"] and error["code"] == "no_chat_template"
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
        ([tmp_path, "--api-key", ""], "--api-key must not be empty"),
        ([tmp_path, "--time-limit", "0"], "--time-limit must be a whole number from 1 "),
    ):
        done = cpp.run("service", *arguments)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert message in line
