"""Servers that speak docs/reference/openai-api.md, and a reference that computes what they must answer.

Each test runs against `coatrt serve` and the C++ service, on a tiny bundle. Another server is asked instead with
COATRT_CONFORMANCE_URL (without /v1), COATRT_CONFORMANCE_KEY and COATRT_CONFORMANCE_BUNDLE, the directory of the bundle
that it serves under the directory's name, with a context of COATRT_CONFORMANCE_CONTEXT.
COATRT_CONFORMANCE_BUNDLE alone starts both servers with that bundle. Real models need COATRT_CONFORMANCE_LEVEL=0:
with products in int8 the last digits, and then tokens, depend on the kernel, and the reference uses another one.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.openai_servers import KEY, KINDS, Server, start_server
from support.reference import Reference

pytest.importorskip("openai", reason="the conformance suite needs OpenAI's client: pip install openai")

URL = os.environ.get("COATRT_CONFORMANCE_URL")
CONTEXT = int(os.environ.get("COATRT_CONFORMANCE_CONTEXT", "512"))
LEVEL = os.environ.get("COATRT_CONFORMANCE_LEVEL", "4")


@pytest.fixture(scope="session")
def bundle(request: pytest.FixtureRequest) -> Path:
    given = os.environ.get("COATRT_CONFORMANCE_BUNDLE")
    return Path(given) if given else request.getfixturevalue("tiny_bundle")


@pytest.fixture(scope="session", params=["url"] if URL else [KINDS[0], pytest.param(KINDS[1], marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def start(kind: str, bundle: Path, request: pytest.FixtureRequest) -> Callable[..., Server]:
    """Return a function that starts a server of the kind under test, with further options."""
    if kind == "url":
        pytest.skip("the server under test is not ours to start")
    cpp = request.getfixturevalue("cpp") if kind == "cpp" else None
    level = ("--accuracy-level", LEVEL) if kind == "python" else ()
    return lambda *options, parallel=4: start_server(kind, cpp, bundle, *options, *level, parallel=parallel)


@pytest.fixture(scope="session")
def server(kind: str, bundle: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    if kind == "url":
        assert URL is not None
        yield Server(URL, os.environ.get("COATRT_CONFORMANCE_KEY", KEY), bundle.name)
        return
    running = request.getfixturevalue("start")("--context", str(CONTEXT))
    yield running
    running.stop()


@pytest.fixture(scope="session")
def client(server: Server) -> Any:
    return server.client


@pytest.fixture(scope="session")
def model(server: Server) -> str:
    return server.model


@pytest.fixture(scope="session")
def reference(bundle: Path) -> Reference:
    return Reference(bundle, CONTEXT, int(LEVEL))
