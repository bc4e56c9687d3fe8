"""Nothing phones home: commands on local paths open no connection and leave no telemetry behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from coatrt.cli.main import cli
from support.tiny import TEXTS

SITE = """
import socket

def refuse(self, address, *_):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        open({log!r}, "a").write(repr(address))
        raise RuntimeError("a connection")
    return connect(self, address)

connect, socket.socket.connect, socket.socket.connect_ex = socket.socket.connect, refuse, refuse
resolve = socket.getaddrinfo

def getaddrinfo(host, *rest, **more):
    open({log!r}, "a").write(repr(host))
    raise RuntimeError("a look-up")

socket.getaddrinfo = getaddrinfo
"""


@pytest.fixture(scope="module")
def bundle(tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("offline") / "bundle"
    arguments = ["build", tiny_adapter, "--target", "rtx-4090", "-o", directory, "--no-engine", "--context", "64"]
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return directory


@pytest.mark.slow
def test_commands_on_local_paths_connect_to_nothing_and_leave_no_telemetry(
    bundle: Path, tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    home, site, log = tmp_path / "home", tmp_path / "site", tmp_path / "log"
    home.mkdir()
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE.format(log=str(log)))
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "ORT_", "XDG_"))}
    python_path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**inherited, "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "PYTHONPATH": python_path}
    env["COATRT_CACHE"] = str(tmp_path / "coatrt")
    program = "import socket; socket.create_connection(('127.0.0.1', 9))"
    assert (
        b"a look-up"
        in subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, check=False).stderr
    )
    log.unlink()
    commands = [
        ["adapt", bundle, "-o", tmp_path / "lora.safetensors"],
        ["run", bundle, "-p", "x", "--chat", "--max-tokens", 2, "--context", 64],
        ["verify", bundle],
        ["plan", tiny_adapter, "--target", "t4"],
        ["train", tiny_llama, "--data", tmp_path / "text.txt", "-o", tmp_path / "out", "--steps", 1, "--batch", 1,
         "--max-length", 32, "--calibration", 1, "--evaluation", 1, "--budgets", 9, "--formats", "int8,fp16"],
    ]  # fmt: skip
    for command in commands:
        arguments = [sys.executable, "-m", "coatrt", *map(str, command)]
        done = subprocess.run(arguments, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stderr)
    assert not log.exists(), log.read_text()
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_the_users_own_setting_wins() -> None:
    program = "import coatrt, os; print(os.environ['ORT_DISABLE_TELEMETRY'], os.environ['HF_HUB_DISABLE_TELEMETRY'])"
    for given, found in (({}, "1 1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0 1")):
        env = {key: value for key, value in os.environ.items() if not key.endswith("DISABLE_TELEMETRY")} | given
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == found
