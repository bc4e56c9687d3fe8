"""A machine with a fake GPU and a fake TensorRT, and decoders on it."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from coatrt.bundle import Bundle
from coatrt.engines.runtime import trt
from coatrt.engines.runtime.cuda_driver import CudaDriver
from coatrt.engines.runtime.load import load_decoder
from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.engines.runtime.ort import OrtDecoder
from coatrt.engines.runtime.trt import TrtDecoder
from coatrt.system import notices
from support.fake_cuda import FakeDriver
from support.fake_tensorrt import FakeContext, FakeTensorRT

__all__ = [
    "COPY_IN",
    "COPY_OUT",
    "LAUNCH",
    "PROMPTS",
    "WAIT",
    "Machine",
    "assert_near",
    "install",
    "loaded",
    "reference",
]

PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [9, 8, 100]]
COPY_IN, COPY_OUT, WAIT, LAUNCH = "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuStreamSynchronize", "cuGraphLaunch"


class Machine:
    """A fake GPU and a fake TensorRT."""

    def __init__(self, **facts: Any) -> None:
        self.driver = FakeDriver(**({"sm": 89} | facts))
        self.tensorrt = FakeTensorRT(self.driver)

    @property
    def decode(self) -> FakeContext:
        return self.tensorrt.contexts[0]

    @property
    def prefill(self) -> FakeContext:
        return self.tensorrt.contexts[1]

    def calls(self, act: Callable[[], Any]) -> dict[str, int]:
        """Return how often `act` makes each call of the driver."""
        before = self.driver.calls.copy()
        act()
        return dict(self.driver.calls - before)


def install(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(trt, "open_driver", lambda: CudaDriver(machine.driver))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", machine.tensorrt)  # type: ignore[arg-type]
    notices.warn_once.cache_clear()
    return machine


def loaded(bundle: Bundle, batch: int = 2) -> TrtDecoder:
    decoder = load_decoder(bundle, RuntimeOptions(backend="trt", batch=batch))
    assert isinstance(decoder, TrtDecoder)
    return decoder


def reference(bundle: Bundle, batch: int = 2) -> OrtDecoder:
    decoder = load_decoder(bundle, RuntimeOptions(batch=batch, context=96, threads=1, accuracy_level=0))
    assert isinstance(decoder, OrtDecoder)
    return decoder


def assert_near(logits: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    """Compare within the rounding of float16: the engine form computes in float16, the cpu form in float32."""
    assert logits.dtype == np.float32
    assert np.abs(expected).max() > 1
    assert np.abs(logits - expected).max() <= 5e-3 * np.abs(expected).max()
