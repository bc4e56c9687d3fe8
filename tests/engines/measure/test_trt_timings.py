"""Timings of engines: a pretended TensorRT whose engines take known times is recovered; what is missing is one line."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coatrt.adapter.description import AdapterDescription
from coatrt.bundle import Bundle
from coatrt.configs.config import QuantConfig
from coatrt.devices.profiles import device_profile
from coatrt.engines.measure import trt_timings
from coatrt.engines.measure.trt_timings import mixed_configuration, products_and_rests, time_trt
from coatrt.engines.runtime.trt import TrtDecoder
from coatrt.errors import BuildError, ConfigError
from coatrt.planning import planner
from coatrt.planning.latency import products_seconds
from coatrt.planning.measured_latency import timings_path
from coatrt.planning.memory import Workload
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.json_data import write_json

DEVICE = replace(device_profile("rtx-4090"), bandwidth=2e9)  # so slow that bytes count in a tiny model
SECONDS = {"int8": 2e-10, "int4": 1.5e-10, "fp8": 1.7e-10, "nf3": 6e-10, "nf4": 5e-10}
"""Seconds that each weight of a kind adds to an engine's step: no better than 2 GB/s allow."""


@pytest.fixture(scope="module")
def facts(tiny_adapter: Path) -> AdapterDescription:
    return AdapterDescription.load(tiny_adapter)


class Engines:
    """Engines whose steps take the sum of their weights' seconds, and something for each slot and prompt token."""

    def __init__(self, facts: AdapterDescription, bundle: Path) -> None:
        self.facts, self.now, self.made = facts, 0.0, list[QuantConfig]()
        self._bundle = bundle

    def step(self, config: QuantConfig, filled: float) -> float:
        weights = sum(SECONDS[config[m.name].kind] * m.N * m.K for m in self.facts.model.multiplied)
        return weights + 2e-4 + 1e-6 * filled

    def make(self, config: QuantConfig, directory: Path) -> Bundle:
        self.made.append(config)
        return Bundle.open(self._bundle)

    def decoder(self, *_: Any, **__: Any) -> "_Decoder":
        return _Decoder(self, self.made[-1])


class _Decoder:
    configuration, strict_lora, capacity = "", False, 96

    def __init__(self, engines: Engines, config: QuantConfig) -> None:
        self._engines, self._config, self._filled = engines, config, 0
        self.loras = 0

    def set_lora(self, tensors: Any) -> None:
        self.loras += 1

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        assert self.loras == 1
        self._filled = len(prompts[0])
        self._engines.now += 5 * self._engines.step(self._config, self._filled)

    def decode(self, tokens: Sequence[int]) -> None:
        self._engines.now += self._engines.step(self._config, self._filled)
        self._filled += 1
        assert self._filled <= self.capacity


def test_engines_of_known_times_are_recovered_and_mixed_maps_predicted(
    facts: AdapterDescription, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = Engines(facts, tiny_bundle)
    monkeypatch.setattr(TrtDecoder, "of", engines.decoder)  # behind load_decoder
    monkeypatch.setattr(trt_timings, "installed_builder", lambda builder: "1.2.3")
    made = time_trt(facts, DEVICE, engines.make, gpu="X", contexts=(48, 2048), prompt=32, clock=lambda: engines.now)
    formats = [fmt for fmt in facts.formats if DEVICE.supports(fmt)]
    assert len(engines.made) == len(formats) + 1
    assert len(set(engines.made[-1].formats.values())) == len(formats)
    assert (made.device, made.backend, made.runtime) == ("rtx-4090", "trt", "tensorrt-rtx 1.2.3")
    assert made.settings["error of a mixed engine"] in ("+0.0%", "-0.0%")
    rng, space = np.random.default_rng(0), facts.space.restrict(formats)
    for context in (48, 96):
        work = Workload.of(facts, context, 1, 32)
        rest = made.rest_seconds(facts.model, work, 1, context)
        for _ in range(5):
            config = space.config(rng.integers(len(formats), size=len(space.groups)).tolist())
            found = products_seconds(made, facts.model, config, 1, 1) + rest
            assert found == pytest.approx(engines.step(config, context - 9 + 0.5 - 0.0), rel=1e-6)
    for fmt in formats:  # the prompt of each engine comes back too
        config, work = QuantConfig.uniform(facts.model, fmt), Workload.of(facts, 48, 1, 32)
        found = products_seconds(made, facts.model, config, 32, 1) + made.rest_seconds(facts.model, work, 32, 48)
        assert found == pytest.approx(5 * engines.step(config, 32), rel=1e-6)
    write_json(timings_path("rtx-4090", "trt"), made, sealed=True)
    try:
        plan = planner.plan(facts, DEVICE, context=48, prefill=32)
        assert "timings of rtx-4090 with tensorrt-rtx 1.2.3" in plan.text()
        assert "whole engines are measured, one per format" in plan.text()
    finally:
        timings_path("rtx-4090", "trt").unlink()


def test_all_else_leaves_every_format_what_the_bandwidth_needs(facts: AdapterDescription) -> None:
    formats = [WeightFormat.parse(text) for text in ("int8", "int4-g32")]
    weights = sum(m.N * m.K for m in facts.model.multiplied)
    steps = {fmt: {16: 1e-3 + fmt.bits * 1e-4, 64: 3e-3 + fmt.bits * 1e-4, -8: 9e-3} for fmt in formats}
    products, rests = products_and_rests(steps, facts, replace(DEVICE, bandwidth=1e12), 8)
    reads = {fmt: sum(fmt.nbytes(m.N, m.K) for m in facts.model.multiplied) / 1e12 for fmt in formats}
    rest = min(found[16] - reads[fmt] for fmt, found in steps.items())
    assert [(r.tokens, r.context, pytest.approx(r.seconds)) for r in rests] == [
        (1, 16, rest), (1, 64, rest + 2e-3), (8, 16, rest)
    ]  # fmt: skip
    for fmt in formats:
        of_fmt = {(p.K, p.N): p.seconds for p in products if p.format == str(fmt.effective(p.K)) and p.tokens == 1}
        for (K, N), seconds in of_fmt.items():
            assert seconds == pytest.approx((steps[fmt][16] - rest) * N * K / weights)


def test_a_mixed_configuration_has_every_format(facts: AdapterDescription) -> None:
    formats = [WeightFormat.parse(text) for text in ("int8", "int4-g32", "fp8")]
    assert set(mixed_configuration(facts, formats).formats.values()) == set(formats)


def test_what_is_missing_is_one_line(facts: AdapterDescription, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(config: QuantConfig, directory: Path) -> Bundle:
        raise AssertionError("nothing is built")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BuildError, match=r"needs tensorrt and polygraphy: pip install '\.\[tensorrt\]'"):
        time_trt(facts, device_profile("h100"), make)
    monkeypatch.setattr(trt_timings, "installed_builder", lambda builder: "1")
    monkeypatch.setattr(trt_timings, "_MAX_FORMATS", 2)
    with pytest.raises(ConfigError, match="give an adapter with 1 to 2"):
        time_trt(facts, DEVICE, make)
