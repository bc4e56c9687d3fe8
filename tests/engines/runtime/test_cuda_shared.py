"""Decoders of one content share a session: weights once, buffers and graphs apart."""

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coatrt.bundle import Bundle
from coatrt.engines.runtime import cuda_shared
from coatrt.engines.runtime.cuda import CudaDecoder
from coatrt.engines.runtime.cuda_driver import CudaDriver
from coatrt.engines.runtime.lora_file import load_lora
from coatrt.engines.runtime.options import RuntimeOptions
from support.fake_cuda import FakeDriver

PROMPTS = [[5, 77, 130, 9, 41, 200, 13], [8, 8, 120]]


def test_decoders_of_one_bundle_share_its_weights(tiny_bundle: Path) -> None:
    bundle, options = Bundle.open(tiny_bundle), RuntimeOptions(backend="cuda", context=64)
    one, two = (CudaDecoder.of(bundle, options, provider="cpu") for _ in range(2))
    small = CudaDecoder.of(bundle, RuntimeOptions(backend="cuda", context=16, batch=2), provider="cpu")
    assert one._session is two._session is small._session
    assert [made._shared.graph_number() for made in (one, two)] == ["4", "5"]  # the three have one each
    two.set_lora(load_lora(bundle.path("lora.safetensors"), bundle.contract))
    plain, adapted = one.prefill(PROMPTS[:1]), two.prefill(PROMPTS[:1])
    assert np.abs(plain - adapted).max() > 1e-2
    expected = one.decode([3]), two.decode([3])
    for decoder in (one, two):
        decoder.prefill(PROMPTS[:1])
    small.prefill(PROMPTS)
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda n=n, d=d: found.update({n: d.decode([3])})) for n, d in enumerate((one, two))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[n], expected[n]) for n in (0, 1))
    session = weakref.ref(one._shared)
    del one, two, small, decoder, threads
    gc.collect()
    assert session() is None  # the weights go with the last decoder


def test_weights_that_are_loaded_already_need_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_shared, "cuda_session", lambda graph, memory: object())
    driver, asked = CudaDriver(FakeDriver()), []
    first = cuda_shared.shared_session(tmp_path, "abc", driver, asked.append)
    assert cuda_shared.shared_session(tmp_path, "abc", driver, asked.append) is first
    others = [cuda_shared.shared_session(tmp_path, name, driver, asked.append) for name in ("abd", "", "")]
    assert asked == [False, True, False, False, False]
    assert len({id(one) for one in (first, *others)}) == 4
    assert first.memory() is not first.memory()
    assert first.memory().stream == first.memory().stream == 11
