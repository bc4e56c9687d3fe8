"""Headers of nlohmann-json, ONNX Runtime and doctest through apt-get, without root, into a directory.

    python examples/fetch_headers.py DIRECTORY          # then pass -DCMAKE_PREFIX_PATH=DIRECTORY to CMake

For machines that reach a Debian mirror and no other site, and for the tests: elsewhere CMake downloads what it does not
find (engines/cpp/coatrt-headers.cmake).
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

__all__ = ["FetchError", "fetch"]

_SUITE = "trixie"
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# Package → a file that it installs. Apt checks Debian's signature of the version it downloads; these versions are
# pinned by hash as well.
_PACKAGES = {
    "nlohmann-json3-dev": "nlohmann/json.hpp",
    "libonnxruntime-dev": "onnxruntime/onnxruntime_c_api.h",
    "doctest-dev": "doctest/doctest.h",
}
_SHA256 = {
    "nlohmann-json3-dev_3.11.3-2.1_all.deb": "741a6a32f61a14eaf9560ba1814b27da8e78fa3b9bed9e8867ab46316ddf3793",
    "libonnxruntime-dev_1.21.0+dfsg-1_amd64.deb": "14f7d959d5deacbcf1504830d4189f91fc67382b399ed9ae9d3aa9c4050ced08",
    "doctest-dev_2.4.11-1_all.deb": "a41b0d152b707310f40c60658d44f1baf51451f094c3b3e6aaa7e077b3ee005e",
}


class FetchError(Exception):
    """The headers cannot be fetched; the message says why."""


def fetch(directory: Path) -> Path:
    """Put the headers into `directory`/include and return that directory.

    Raises:
        FetchError: this machine has no apt-get or no Debian keyring, or a download fails or differs from its hash.
    """
    include = directory / "include"
    if all((include / shown).is_file() for shown in _PACKAGES.values()):
        return include
    if not all(map(shutil.which, ("apt-get", "dpkg-deb"))) or not _KEYRING.is_file():
        raise FetchError(
            "apt-get or Debian's keyring is missing; install nlohmann-json, doctest and ONNX Runtime's C API headers "
            "yourself and name their directory in CMAKE_PREFIX_PATH"
        )
    include.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        run = _apt(work)
        run("apt-get", "update")
        run("apt-get", "download", *_PACKAGES)
        for archive in sorted(work.glob("*.deb")):
            expected, found = _SHA256.get(archive.name), hashlib.sha256(archive.read_bytes()).hexdigest()
            if expected not in (None, found):
                raise FetchError(f"{archive.name} has sha256 {found[:12]}…, expected {expected[:12]}…; do not use it")
            run("dpkg-deb", "--extract", str(archive), str(work / "root"))
        shutil.copytree(work / "root/usr/include", include, dirs_exist_ok=True)
    return include


def _apt(work: Path) -> Callable[..., None]:
    """Return a function that runs commands with an apt configuration and state in `work` alone."""
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (work / folder).mkdir(parents=True)
    (work / "state/status").touch()
    (work / "sources.list").write_text(f"deb [signed-by={_KEYRING}] {_repository()} {_SUITE} main\n")
    (work / "apt.conf").write_text(
        f'Dir::State "{work}/state"; Dir::State::status "{work}/state/status"; Dir::Cache "{work}/cache";\n'
        f'Dir::Etc::sourcelist "{work}/sources.list"; Dir::Etc::sourceparts "-"; Acquire::Languages "none";\n'
        f'APT::Sandbox::User "{"root" if os.getuid() == 0 else ""}";\n'
    )

    def run(*command: str) -> None:
        environment = {**os.environ, "APT_CONFIG": str(work / "apt.conf"), "LC_ALL": "C"}
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise FetchError(
                f"{' '.join(command[:2])} failed ({''.join(said)}); check the network, or install the headers"
            )

    return run


def _repository() -> str:
    """Return the Debian mirror of this machine's apt configuration, or Debian's own address."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    known = [line for line in done.stdout.splitlines() if line.rstrip("/").endswith("/debian")]
    return known[0] if known else "http://deb.debian.org/debian"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/fetch_headers.py DIRECTORY")
    try:
        print(fetch(Path(sys.argv[1])))
    except FetchError as problem:
        sys.exit(f"fetch_headers: {problem}")
