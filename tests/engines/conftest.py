"""A bundle of the tiny adapter, without an engine; the C++ programs of the tests, compiled with sanitizers."""

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from coatrt.adapter.adapter import Adapter
from coatrt.devices.profiles import device_profile
from coatrt.engines.bundles.options import BundleOptions
from coatrt.planning import planner
from fetch_headers import FetchError, fetch
from support.bundles import make_bundle

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tiny_bundle(tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    adapter = Adapter.from_pretrained(tiny_adapter)
    profile = device_profile("rtx-4090")
    plan = planner.plan(adapter.description, profile, bits=5.2, context=96, prefill=32)
    directory = tmp_path_factory.mktemp("bundle") / "rtx-4090"
    options = BundleOptions(context=96, engine=False)
    make_bundle(adapter, plan.config, profile.id, directory, options, plan=plan)
    return directory


class Built:
    """The compiled programs, with what they need in their environment."""

    def __init__(self, directory: Path) -> None:
        ort = pytest.importorskip("onnxruntime")
        (library,) = Path(ort.__file__).parent.glob("capi/libonnxruntime.so.*")
        suppressions = directory / "lsan.txt"
        suppressions.write_text("leak:libonnxruntime\n")  # ONNX Runtime keeps what it made at start
        self.directory = directory
        self.environment = {
            **os.environ,
            "COATRT_ONNXRUNTIME": str(library),
            "LSAN_OPTIONS": f"suppressions={suppressions}",
        }

    def run(self, program: str, *arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
        command = [str(self.directory / program), *map(str, arguments)]
        found = {**self.environment, **environment}
        return subprocess.run(command, env=found, capture_output=True, text=True, check=False, timeout=600)

    def probe(self, *arguments: object) -> Any:
        done = self.run("probe", *arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def refusal(self, *arguments: object) -> str:
        """Return the one line with which the library refuses; anything else, a crash or a finding, is a failure."""
        done = self.run("probe", *arguments)
        assert done.returncode == 2, (done.returncode, done.stderr[-2000:])
        (line,) = done.stderr.splitlines()
        return line


@contextmanager
def alone(name: str) -> Iterator[None]:
    """Let one of several test processes at a time into a directory of build/."""
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def headers() -> Path:
    for program in ("cmake", os.environ.get("CXX", "c++")):
        if shutil.which(program) is None:
            pytest.skip(f"the C++ tests need {program}")
    try:
        with alone("headers"):
            return fetch(ROOT / "build" / "deps")
    except FetchError as error:
        pytest.skip(f"the C++ tests need headers: {error}")


def compile_cpp(source: Path, directory: Path, *options: str) -> None:
    for command in (
        ["cmake", "-S", source, "-B", directory, *options],
        ["cmake", "--build", directory, "--parallel", os.cpu_count() or 1],
    ):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.fixture(scope="session")
def cpp(headers: Path) -> Built:
    directory = ROOT / "build" / "cpp"
    with alone("cpp"):
        compile_cpp(ROOT / "tests" / "engines" / "cpp", directory, f"-DCMAKE_PREFIX_PATH={headers.parent}")
    return Built(directory)
