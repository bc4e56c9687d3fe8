"""Measured constants of ONNX Runtime's CUDA provider: closed forms, their fit, steps it has not seen, what plans say.

The fit recovers a GPU whose times follow known constants.
"""

import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from coatrt.adapter.description import AdapterDescription
from coatrt.configs.config import QuantConfig
from coatrt.devices.profiles import device_profile, device_profiles
from coatrt.engines.runtime import cuda_memory
from coatrt.models.matrices import ModelMatrices, matrices_of
from coatrt.models.spec import DecoderSpec
from coatrt.planning import planner
from coatrt.planning.cuda_latency import CONSTANTS, CudaConstants, CudaLatency, PackedProduct
from coatrt.planning.engine_size import CPU_PACKED
from coatrt.planning.latency import DatasheetLatency, latency_of, products_seconds
from coatrt.planning.memory import Workload
from coatrt.quantization.weight_format import WeightFormat

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
RESULTS = BENCHMARKS / "results"
ROWS = {row["key"]: row for row in json.loads((RESULTS / "gpu" / "h100.json").read_text())["rows"]}
FIT = json.loads((RESULTS / "latency_constants.json").read_text())
SHAPES = {
    "135m": (576, 1536, 30, 9, 3, 64, 49152, True),
    "1b": (2048, 8192, 16, 32, 8, 64, 128256, True),
    "7b": (4096, 14336, 32, 32, 8, 128, 32768, False),
}
"""Hidden, inner, layers, heads, KV heads, head width, vocabulary, tied: SmolLM2-135M, Llama 3.2 1B, Mistral 7B."""


def int4(layer: int, kind: str) -> str:
    return "int4-g64"


def third(layer: int, kind: str) -> str:
    return "int8-g128" if (layer * 7 + len(kind)) % 3 == 0 else "int4-g64"


def with_nvfp4(layer: int, kind: str) -> str:
    found = third(layer, kind)
    return found if found != "int4-g64" or (layer + len(kind)) % 2 or layer < 0 else "nvfp4"


MAPS: dict[str, Callable[[int, str], str]] = {"int4-g64": int4, "mixed": third, "mixed with nvfp4": with_nvfp4}
HELD_OUT = [
    "backend/speed/135m/mixed/lora",
    "backend/speed/1b/mixed/lora",
    "backend/speed/1b/mixed with nvfp4/lora",
    "backend/speed/7b/int4-g64/lora",
]


def model_of(name: str) -> tuple[ModelMatrices, DecoderSpec, int]:
    hidden, inner, layers, heads, kv, width, vocabulary, tied = SHAPES[name]
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        for kind, size in (
            ("self_attn.q_proj", (heads * width, hidden)),
            ("self_attn.k_proj", (kv * width, hidden)),
            ("self_attn.v_proj", (kv * width, hidden)),
            ("self_attn.o_proj", (hidden, heads * width)),
            ("mlp.gate_proj", (inner, hidden)),
            ("mlp.up_proj", (inner, hidden)),
            ("mlp.down_proj", (hidden, inner)),
        ):
            sizes[f"model.layers.{layer}.{kind}.weight"] = size
    if not tied:
        sizes["lm_head.weight"] = (vocabulary, hidden)
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": width,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
    }
    return matrices_of(sizes, tied), DecoderSpec.from_config(config), inner


def predicted(key: str) -> float:
    """Return the seconds of a decoded token of backend/speed/MODEL/MAP/LORA on the H100."""
    _, _, name, text, lora = key.split("/")
    model, spec, inner = model_of(name)
    config = QuantConfig({m.name: WeightFormat.parse(MAPS[text](m.layer, m.kind)) for m in model.matrices})
    parameters = 16 * sum(m.N + m.K for m in model.targets) if lora == "lora" else 0
    work = Workload(spec, inner, parameters, 2048, 1, 512, 2)
    latency = CudaLatency(device_profile("h100"), joined=False)  # as the graphs were that were measured
    return products_seconds(latency, model, config, 1, 1) + latency.rest_seconds(model, work, 1, 700)


@pytest.mark.parametrize("key", HELD_OUT)
def test_steps_that_the_fit_has_not_seen_are_within_their_stated_error(key: str) -> None:
    (row,) = [row for row in FIT["rows"] if row["key"] == key and row["gpu"] == "h100"]
    measured = ROWS[key]["decode_ms"]["p50_ms"]
    assert row["measured_ms"] == measured
    assert not row["seen"]
    found = 1e3 * predicted(key)
    assert found == pytest.approx(row["predicted_ms"], rel=2e-3)  # the constants have four digits
    assert abs(found / measured - 1) <= FIT["worst_held_out"] + 2e-3
    assert abs(row["error_without_7b"]) <= FIT["worst_held_out_without_7b"]
    assert max(FIT["worst_held_out"], FIT["worst_held_out_without_7b"]) <= 0.15


def test_all_steps_but_those_seen_are_held_out() -> None:
    steps = {row["key"]: row for row in FIT["rows"] if row["key"].startswith("backend/")}
    assert {key for key, row in steps.items() if not row["seen"]} == set(HELD_OUT)
    assert steps.keys() == {key for key, row in ROWS.items() if key.startswith("backend/speed/") and "decode_ms" in row}
    by_hand = [row for row in FIT["rows"] if not row["key"].startswith("backend/")]
    joined = [row for row in by_hand if row["key"].endswith("joined")]
    assert (len(by_hand), len(joined)) == (22, 12)
    assert max(abs(row["error"]) for row in joined) <= 0.16
    assert max(abs(row["error"]) for row in by_hand if row not in joined) <= 0.15


@pytest.fixture
def latency() -> CudaLatency:
    """Constants that make sums easy."""
    made = replace(
        CONSTANTS,
        bandwidth_share=0.5,
        flops_share=0.25,
        floor_seconds=1e-6,
        input_seconds=1e-9,
        packed={"int4": PackedProduct(2e-6, 3e-9, 0.001, 0.5), "int8": PackedProduct(2e-6, 3e-9, 0.001, 9.0)},
        lora_seconds=1e-6,
        lora_doubling_seconds=1e-7,
        lora_output_seconds=1e-10,
        lora_least_input=1024,
        kernel_seconds=2e-6,
        host_seconds_per_byte=1e-9,
        launch_seconds=1e-5,
    )
    device = replace(device_profile("h100"), bandwidth=2e12, fp16_flops=1e15)
    return CudaLatency(device, made, joined=False)


def test_products_are_read_computed_or_decoded_first(latency: CudaLatency) -> None:
    N, K = 4096, 2048
    weights = N * K
    dense = 1e-6 + 1e-9 * K + 2 * weights / 1e12 + 2 * weights / 0.25e15
    for text in ("fp16", "bf16", "fp8", "nvfp4", "nf3-g64", "nf4-g32-dq8-fp16-64"):
        assert latency.matrix_seconds(N, K, WeightFormat.parse(text), 1) == pytest.approx(dense)
    fixed, computed = 2e-6 + 3e-9 * K, 2 * weights / (0.001 * 1e15)
    for text in ("int4-g64", "int8"):
        assert latency.matrix_seconds(N, K, WeightFormat.parse(text), 1) == pytest.approx(fixed + computed)
    int4, int8 = WeightFormat.parse("int4-g64"), WeightFormat.parse("int8")
    assert latency.matrix_seconds(N, K, int4, 3) == pytest.approx(fixed + 2 * computed)
    many = 1e-6 + 1e-9 * K + 2 * weights / 1e12 + 512 * 2 * weights / 0.25e15
    decoded = many + (int8.nbytes(N, K) + 2 * weights) / 1e12 + 2e-6
    assert latency.matrix_seconds(N, K, int8, 512) == pytest.approx(decoded)
    slow = CudaLatency(replace(device_profile("h100"), bandwidth=2e11, fp16_flops=1e15), latency._constants)
    assert slow.matrix_seconds(N, K, int4, 1) == pytest.approx(fixed + int4.nbytes(N, K) / 1e11)


def test_all_else_is_kernels_caches_lora_and_the_host(latency: CudaLatency) -> None:
    model, spec, inner = model_of("135m")
    work = Workload(spec, inner, 0, 2048, 1, 512, 2)
    bare = (30 * 9 + 3) * 2e-6 + 4 * 49152 * 1e-9
    caches = 2 * 2 * 30 * 3 * 64 * 1024 / 1e12
    attention = 4 * 30 * 9 * 64 * 1024 / 0.25e15
    assert latency.rest_seconds(model, work, 1, 1024) == pytest.approx(bare + caches + attention)
    lora = replace(work, lora_parameters=1)
    doublings = {576: 10.0, 1536: 10.584962500721156}
    more = sum(1e-6 + 1e-7 * doublings[m.K] + 1e-10 * m.N for m in model.targets)
    assert latency.rest_seconds(model, lora, 1, 1024) == pytest.approx(bare + caches + attention + more)
    # A prompt: 5 nodes a layer, a product and three nodes of LoRA for each of 210 matrices, 3 outside, 10 µs each.
    nodes = 30 * 5 + 210 * 4 + 3
    dense = sum(latency.matrix_seconds(m.N, m.K, WeightFormat.parse("fp16"), 2) for m in model.targets)
    assert latency.rest_seconds(model, lora, 2, 2) == pytest.approx(nodes * 1e-5 - dense + 4 * 49152 * 1e-9)
    # Joined, q|k|v and gate|up have one LoRA each, and of their products two and one fewer begin.
    together = CudaLatency(latency._device, latency._constants)
    once = 30 * sum(
        1e-6 + 1e-7 * doublings[K] + 1e-10 * N for K, N in ((576, 960), (576, 576), (576, 3072), (1536, 576))
    )
    saved = 30 * 3 * (2e-6 + 3e-9 * 576)
    assert together.rest_seconds(model, lora, 1, 1024) == pytest.approx(bare + caches + attention + once - saved)
    nodes = 30 * 5 + 120 * 4 + 3
    assert together.rest_seconds(model, lora, 2, 2) == pytest.approx(nodes * 1e-5 - dense + 4 * 49152 * 1e-9)


def test_which_devices_the_constants_are_for() -> None:
    assert [one.id for one in device_profiles() if CudaLatency.serves(one)] == ["h100-pcie", "h100", "h200"]
    assert CPU_PACKED == ("int8", "int4") and set(CPU_PACKED) == set(cuda_memory._PACKED)
    assert set(CONSTANTS.packed) == set(CPU_PACKED)


def test_plans_say_what_is_measured_and_what_is_assumed(tiny_adapter: Path) -> None:
    adapter = AdapterDescription.load(tiny_adapter)
    said: dict[str, Any] = {}
    for name in ("h100", "h100-pcie", "rtx-4090", "jetson-thor"):
        plan = planner.plan(adapter, device_profile(name), context=64)
        assert plan.latency_source in plan.text()
        said[name] = plan.latency_source
        assert type(latency_of(device_profile(name), adapter.space, _work(adapter))) is (
            CudaLatency if name.startswith("h100") else DatasheetLatency
        )
    measured = "measured on NVIDIA H200 and NVIDIA H100 80GB HBM3 with onnxruntime-gpu"
    assert measured in said["h100"] and "assumed" not in said["h100"]
    assert measured in said["h100-pcie"] and "assumed: that NVIDIA H100 PCIe reaches" in said["h100-pcie"]
    for name in ("rtx-4090", "jetson-thor"):
        assert "assumed: 80% of peak bandwidth, 50% of FP16 throughput; read from engines: formats" in said[name]
        assert "; measured: 2.3 µs a kernel (onnxruntime-gpu" in said[name]


def _work(adapter: AdapterDescription) -> Workload:
    return Workload.of(adapter, 64, 1, 64)


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
