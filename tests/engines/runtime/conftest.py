"""A bundle with an engine, and a machine of fakes that runs it."""

from pathlib import Path

import pytest

from coatrt.bundle import Bundle
from coatrt.engines.runtime.decoder import LoraTensors
from coatrt.engines.runtime.emitter import Emitter
from support.fake_tensorrt import add_engine
from support.trt_machine import Machine, install


@pytest.fixture(scope="session")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return add_engine(tiny_bundle, tmp_path_factory.mktemp("trt") / "bundle")


@pytest.fixture(scope="session")
def lora(bundle: Bundle) -> LoraTensors:
    return Emitter.of(bundle, threads=1).emit(bundle.config)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return install(Machine(), monkeypatch)
