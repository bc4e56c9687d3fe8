"""How the command ends: told to, without a reader, and when something raises what nobody foresaw."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from coatrt.cli.main import main
from coatrt.errors import CoatError


@pytest.mark.slow
@pytest.mark.rtx
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_build_that_is_told_to_end_stops_its_builder_and_leaves_nothing(
    tiny_adapter: Path, tmp_path: Path, number: signal.Signals
) -> None:
    pytest.importorskip("tensorrt_rtx")
    place, temporary = tmp_path / "bundles", tmp_path / "tmp"
    temporary.mkdir()

    def start(*options: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "coatrt", "build", str(tiny_adapter), "-o", str(place / "b"), *options]
        environment = {**os.environ, "TMPDIR": str(temporary)}
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)

    process = start("--target", "rtx-5090", "--no-cache")
    try:
        workers: list[psutil.Process] = []
        deadline = time.monotonic() + 120
        while not workers and process.poll() is None and time.monotonic() < deadline:
            workers = [
                child for child in psutil.Process(process.pid).children() if "worker" in " ".join(child.cmdline())
            ]
        assert workers, "no builder was started"
        if number == signal.SIGKILL:
            time.sleep(0.5)  # it asks the system to end with its parent first of all
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
        assert not said
        assert psutil.wait_procs(workers, timeout=30)[1] == []
        assert [path.name for path in temporary.iterdir() if "coatrt" in path.name] == []
        if number == signal.SIGKILL:
            assert list(place.iterdir())
            again = start("--target", "cpu")
            again.communicate(timeout=60)
            assert (again.returncode, [path.name for path in place.iterdir()]) == (0, ["b"])
        else:
            assert not place.exists()
    finally:
        process.kill()


def ended(arguments: list[object], code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["coatrt", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == code


class Panic(BaseException):
    """As libraries in Rust raise it."""


def endlessly(depth: int = 0) -> int:
    return endlessly(depth + 1) + 1


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (CoatError("not so\n\x1b[31mred"), 2, "not so \\x1b[31mred"),
        (ZeroDivisionError("division\nby zero"), 70, "unexpected ZeroDivisionError: division by zero; a report is in "),
        (Panic("index out of range"), 70, "unexpected Panic: index out of range; a report is in "),
        (None, 70, "unexpected RecursionError: maximum recursion depth exceeded"),
        (MemoryError("1 TiB"), 2, "not enough memory (1 TiB)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "not enough memory; close other"),
        (RuntimeError("no\ud83d"), 70, "unexpected RuntimeError: no\\ud83d; a report"),
        (PermissionError(13, "Permission denied", "/a/b"), 2, "/a/b: Permission denied; check the path"),
        (OSError(28, "No space left on device"), 2, "No space left on device; check the path"),
        (ConnectionError("hub"), 70, "unexpected ConnectionError: hub; a report"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
        (ValueError("x" * 10**6), 70, f"unexpected ValueError: {'x' * 300}; a report"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_whatever_is_raised_is_one_line_and_a_documented_exit_code(
    raised: BaseException | None,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def fail(*_: object) -> None:
        if raised is None:
            endlessly()
        else:
            raise raised

    monkeypatch.setenv("COATRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("coatrt.cli.devices._show", fail)
    ended(["devices", "--json"], code, monkeypatch)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == bool(said)
    if said:
        assert lines[0].startswith(f"coatrt: {said}")
    reports = list(tmp_path.rglob("*.txt"))
    assert len(reports) == (code == 70)
    if reports:
        assert str(reports[0]) in lines[0]
        text = reports[0].read_text()
        assert "Traceback" in text and "coatrt devices --json\n" in text and "python 3." in text


def test_streams_that_are_narrow_closed_full_or_unread(tmp_path: Path) -> None:
    def shell(line: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = f'coatrt() {{ {sys.executable} -m coatrt "$@"; }}; {line}'
        return subprocess.run(
            ["bash", "-c", command],
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )

    def result(line: str, **env: str) -> tuple[int, str]:
        done = shell(line, **env)
        return done.returncode, done.stderr.strip()

    assert result("coatrt devices >&- 2>&- <&-") == (0, "")
    assert result("coatrt devices > /dev/full") == (
        2,
        "coatrt: No space left on device; check the path, its permissions and the free disk space",
    )
    assert result("coatrt devices | head -c 1; exit ${PIPESTATUS[0]}", PYTHONUNBUFFERED="1")[1] == ""
    assert result("set -o pipefail; coatrt devices | true")[0] in (0, 1)
    assert result("coatrt plan x --target t4 2> /dev/full") == (2, "")
    assert result("coatrt plan 2> /dev/full") == (2, "")
    done = shell("coatrt plan ä\U0001f600x --target t4", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr.splitlines()[0]) == (
        2,
        "coatrt: adapter \\xe4\\U0001f600x does not exist; give the directory that coatrt train wrote",
    )


@pytest.mark.parametrize("arguments", [[], ["devices", "calibrate"]])
def test_without_arguments_the_help_is_shown_as_it_is(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended(arguments, 2, monkeypatch)
    said = capsys.readouterr().err
    if not arguments:
        assert said.startswith("Usage: coatrt [OPTIONS] COMMAND") and said.count("\n") > 20
    else:
        assert said == "coatrt: Missing argument 'ADAPTER'; see coatrt devices calibrate --help\n"


def test_a_wrong_option_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ended(["plan", "x", "--target", "t4", "--memory", "x"], 2, monkeypatch)
    said = capsys.readouterr().err
    assert said.startswith("coatrt: Invalid value for '--memory'")
    assert said.endswith("; see coatrt plan --help\n") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "x", "--mem", "1GiB"], "No such option '--mem'. Did you mean '--memory'? See coatrt plan --help"),
        (["run", "x", "--promt", "1"], "No such option '--promt'. Did you mean '--prompt'? See coatrt run --help"),
        (["trian"], "No such command 'trian'. Did you mean 'train'? See coatrt --help"),
        (["devices", "prob"], "No such command 'prob'. Did you mean 'probe'? See coatrt devices --help"),
        (["plan"], "Missing argument 'ADAPTER'; see coatrt plan --help"),
    ],
)
def test_a_near_name_is_suggested(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended(list(arguments), 2, monkeypatch)
    assert capsys.readouterr().err == f"coatrt: {said}\n"
