"""Timings on this machine: they cover a space, add up, and the planner takes them."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from coatrt.adapter.adapter import Adapter
from coatrt.devices.profiles import device_profile
from coatrt.engines.bundles.contents import export_config, export_shared
from coatrt.engines.bundles.options import BundleOptions
from coatrt.engines.measure.cpu_timings import time_cpu, time_product
from coatrt.engines.measure.whole_decoders import without_drift
from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.engines.runtime.ort import OrtDecoder
from coatrt.errors import ConfigError
from coatrt.export.decoder import GraphForm, decoder_io
from coatrt.planning import planner
from coatrt.planning.measured_latency import MeasuredLatency, Product, timings_path
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.json_data import write_json


@pytest.fixture(scope="module")
def adapter(tiny_adapter: Path) -> Adapter:
    return Adapter.from_pretrained(tiny_adapter)


def test_a_product_takes_its_share_of_the_copies_that_fill_the_working_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coatrt.engines.measure.cpu_timings._WORKING_SET", 1 << 20)
    fmt, ticks, options = WeightFormat.parse("int8"), itertools.count(), RuntimeOptions(threads=1)

    def clock() -> float:  # every run takes a second
        return float(next(ticks))

    (small,) = time_product(64, 64, fmt, [1], options=options, clock=clock)
    one, many = time_product(1024, 1024, fmt, [1, 64], options=options, clock=clock)
    assert (one.K, one.N, one.format, one.tokens, many.tokens) == (1024, 1024, "int8", 1, 64)
    assert small.seconds == 1 / ((1 << 20) // fmt.nbytes(64, 64))
    assert one.seconds == many.seconds == 1 / 2  # two at least: no product finds its weight in the cache


def test_products_timed_on_a_slow_machine_are_scaled_to_its_median_speed() -> None:
    timed = [[Product(8, 8, "int8", 1, 2.0), Product(8, 8, "int8", 4, 6.0)], [Product(8, 16, "int8", 1, 3.0)]]
    found = without_drift(timed, [0.2, 0.4, 0.1])  # the median is 0.2; beside the products 0.3 and 0.25
    assert [product.seconds for product in found] == pytest.approx([2 / 1.5, 6 / 1.5, 3 / 1.25])
    assert [(product.N, product.tokens) for product in found] == [(8, 1), (8, 4), (16, 1)]


@pytest.mark.slow
def test_timings_cover_their_model_and_the_planner_takes_them(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coatrt.engines.measure.cpu_timings._WORKING_SET", 1 << 16)
    monkeypatch.setattr("coatrt.engines.measure.cpu_timings._BUDGET", 0.005)
    seen: list[int] = []
    made = time_cpu(
        adapter,
        adapter.checkpoint(),
        RuntimeOptions(threads=1),
        tokens=(1, 8),
        contexts=(32, 64),
        progress=lambda done, total, _: seen.append(total - done),
    )
    assert seen[-1] == 0
    shapes = {(m.K, m.N) for m in adapter.description.model.matrices}
    assert {(p.K, p.N) for p in made.products} == shapes
    assert {(rest.tokens, rest.context) for rest in made.rests} == {(1, 32), (8, 32), (1, 64), (8, 64)}
    write_json(timings_path("cpu"), made, sealed=True)
    try:
        assert MeasuredLatency.load(timings_path("cpu")) == made
        plan = planner.plan(
            adapter.description, device_profile("cpu"), objective="latency", max_loss=1e9, context=64, prefill=8
        )
        assert "timings of cpu" in plan.latency_source
        chosen = sum(made.matrix_seconds(m.N, m.K, plan.config[m.name], 1) for m in adapter.description.model.matrices)
        (rest,) = (rest.seconds for rest in made.rests if (rest.tokens, rest.context) == (1, 64))
        assert plan.decode_seconds == pytest.approx(chosen + rest)
        for fmt in adapter.description.formats:  # a fused group has one format, so no uniform one can be faster
            assert chosen <= 1.001 * sum(
                made.matrix_seconds(m.N, m.K, fmt, 1) for m in adapter.description.model.matrices
            )
    finally:
        timings_path("cpu").unlink()
    with pytest.raises(ConfigError, match="tokens and contexts must be at least 1"):
        time_cpu(adapter, adapter.checkpoint(), tokens=())


def test_decoded_and_packed_weights_give_the_same_logits(adapter: Adapter, tmp_path: Path) -> None:
    """Levels 0 and 1 are exact, level 4 is not; 0 leaves no quantized product in the session."""
    checkpoint = adapter.checkpoint()
    for text in ("int8", "int4-g32"):
        place = tmp_path / text
        place.mkdir()
        export_shared(adapter, checkpoint, place)
        config, options = adapter.description.space.uniform(text), BundleOptions(context=64)
        export_config(adapter, checkpoint, config, place, place, options, codes=adapter.codes(checkpoint))
        io = decoder_io(checkpoint, GraphForm("cpu", "cpu.onnx", "float32"))
        decoded, packed, fast = (
            OrtDecoder(
                place / "cpu.onnx", io, adapter.description.contract, RuntimeOptions(context=32, accuracy_level=level)
            ).prefill([[1, 2, 3]])
            for level in (0, 1, 4)
        )
        largest = np.abs(packed).max()
        assert np.abs(decoded - packed).max() <= 1e-5 * largest
        assert np.abs(fast - packed).max() > 1e-4 * largest
