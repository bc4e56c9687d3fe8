"""The fit of the planner's constants: a GPU whose times follow known constants is recovered."""

import importlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from coatrt.devices.profiles import device_profile
from coatrt.planning.cuda_latency import CONSTANTS, CudaConstants, CudaLatency, PackedProduct
from coatrt.quantization.weight_format import WeightFormat

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
TRUE = replace(
    CONSTANTS,
    bandwidth_share=0.9,
    flops_share=0.7,
    floor_seconds=4e-6,
    input_seconds=5e-10,
    packed={"int4": PackedProduct(3e-6, 4e-10, 0.012, 0.3), "int8": PackedProduct(2e-6, 7e-10, 0.006, 0.1)},
    lora_seconds=-2e-6,
    lora_doubling_seconds=9e-7,
    lora_output_seconds=3e-10,
    kernel_seconds=3e-6,
    host_seconds_per_byte=5e-10,
    launch_seconds=2e-5,
)


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "gpu"))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("latency_constants")


def rows_of_a_known_gpu(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace every measured time that the fit reads by what the true constants give."""
    latency = CudaLatency(device_profile("h200"), TRUE)
    products = {}
    for name, (N, K) in fit.SHAPES.items():
        for text in ("fp16", *fit.BLOCKS["int4"], *fit.BLOCKS["int8"]):
            for rows in (1, 4, 16, 128, 1024):
                seconds = latency.matrix_seconds(N, K, WeightFormat.parse(text), rows)
                products[f"product/{name}/{text}/M{rows}"] = {"us": {"median": seconds * 1e6}}
    for name, (K, widths) in fit.GROUPS.items():
        lora = sum(latency.lora_seconds(N, K, 1) for N in widths)
        for way, seconds in (("none", 1e-5), ("separate", 1e-5 + lora)):
            products[f"group/{name}/M1/base separate/LoRA {way}"] = {"us": {"median": seconds * 1e6}}
    steps = {}
    for key in fit.STEPS:
        model, _ = fit.step_of(key)
        nodes = model._spec.layers * 5 + len(model.matrices.targets) * (4 if model.contract else 1) + 3
        steps[key] = {
            "decode_ms": {"p50_ms": fit.predicted(key, TRUE, "h100") * 1e3},
            "prefill_ms": {"p50_ms": nodes * TRUE.launch_seconds * 1e3},
        }
    monkeypatch.setattr(fit, "H200", products)
    monkeypatch.setattr(fit, "H100", steps)


@pytest.mark.parametrize("without", ["", "7b"])
def test_a_gpu_of_known_constants_is_recovered(fit: Any, monkeypatch: pytest.MonkeyPatch, without: str) -> None:
    rows_of_a_known_gpu(fit, monkeypatch)
    found: CudaConstants = fit.fitted(without)
    for name, value in asdict(TRUE).items():
        made = asdict(found)[name]
        if name == "packed":
            for kind, numbers in value.items():
                assert made[kind] == pytest.approx(numbers, rel=0.02), kind
        elif isinstance(value, float):
            assert made == pytest.approx(value, rel=0.02), name
    for key in fit.STEPS:  # those held out too
        assert fit.predicted(key, found, "h100") == pytest.approx(fit.predicted(key, TRUE, "h100"), rel=0.01)


def test_committed_constants_are_those_of_the_committed_rows(fit: Any) -> None:
    for name, value in asdict(fit.fitted()).items():
        committed = asdict(CONSTANTS)[name]
        if name == "packed":
            for kind, numbers in value.items():
                assert committed[kind] == pytest.approx(numbers, rel=1e-3)
        elif isinstance(value, float):
            assert committed == pytest.approx(value, rel=1e-3), name
        else:
            assert committed == value
