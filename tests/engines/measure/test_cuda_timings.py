"""Timings of a GPU: on the CPU provider, and on a pretended GPU whose every time is known."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from coatrt.adapter.adapter import Adapter
from coatrt.configs.config import QuantConfig
from coatrt.devices.profiles import device_profile
from coatrt.engines.measure import cuda_timings
from coatrt.engines.measure.cuda_timings import _representatives, _smallest, time_cuda, time_products
from coatrt.engines.measure.product_graph import copies_of, write_products
from coatrt.engines.runtime.cuda import CudaDecoder
from coatrt.engines.runtime.cuda_session import cuda_session
from coatrt.engines.runtime.memory import HostMemory
from coatrt.errors import BuildError, ConfigError
from coatrt.export.decoder import export_decoder
from coatrt.export.graph import GraphForm
from coatrt.planning import planner
from coatrt.planning.cuda_latency import LAYER_NODES, LORA_NODES
from coatrt.planning.latency import latency_of, products_seconds
from coatrt.planning.measured_latency import MeasuredLatency, timings_path
from coatrt.planning.memory import Workload
from coatrt.quantization.codec import decode, encode
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.json_data import write_json

FORM = GraphForm("cuda", "cuda.onnx", "float16")


@pytest.fixture(scope="module")
def adapter(tiny_adapter: Path) -> Adapter:
    return Adapter.from_pretrained(tiny_adapter)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_timings, "_WORKING_SET", 1 << 16)
    monkeypatch.setattr(cuda_timings, "_BUDGET", 0.0)
    monkeypatch.setattr(cuda_timings, "_REPLAYS", 2)


@pytest.mark.parametrize("text", ["int4-g32", "int8", "nf3-g32", "fp8"])
def test_every_product_of_the_graph_has_a_weight_of_its_own(text: str, tmp_path: Path) -> None:
    K, N, fmt, copies = 64, 96, WeightFormat.parse(text), 3
    made = cuda_session(write_products(tmp_path, FORM, K, N, fmt, copies), HostMemory())
    x = np.random.default_rng(0).normal(size=(2, K)).astype(np.float16)
    found = made.run([f"y{copy}" for copy in range(copies)], {"x": x})
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) / K**0.5
    matrix = encode(weight, fmt, "absmax")
    codes = matrix.codes.view(torch.uint8) if matrix.codes.element_size() == 1 else matrix.codes
    for copy, y in enumerate(found):
        turned = replace(matrix, codes=codes.roll(copy, 0).view(matrix.codes.dtype))
        expected = x.astype(np.float32) @ decode(turned, torch.float32).numpy().T
        assert np.abs(y - expected).max() <= 4e-3 * np.abs(expected).max()
    assert not np.array_equal(found[0], found[1])


def test_copies_fill_what_no_cache_holds() -> None:
    int4, nf3 = WeightFormat.parse("int4-g64"), WeightFormat.parse("nf3-g64")
    assert copies_of(4096, 4096, int4, 256 << 20, (2, 256), 2) == (256 << 20) // int4.nbytes(4096, 4096)
    assert copies_of(4096, 4096, nf3, 256 << 20, (2, 256), 2) == (256 << 20) // (2 << 24)  # decoded at load
    assert copies_of(64, 64, int4, 256 << 20, (2, 256), 2) == 256
    assert copies_of(16384, 16384, nf3, 256 << 20, (2, 256), 2) == 2


def test_a_run_is_timed_in_rows_that_wait_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host starts many runs and waits for all: what a wait and a launch cost is not in a run's time."""
    now = [0.0]

    class Stream(HostMemory):
        waiting = 0.0

        def synchronize(self) -> None:
            now[0] += self.waiting
            self.waiting = 0.0

    stream = Stream()

    def run() -> None:
        now[0] += 1e-5  # the host's part, beside the GPU's
        stream.waiting += 1e-3 - 1e-5

    assert cuda_timings._run_seconds(run, stream, lambda: now[0]) == pytest.approx(1e-3)


def test_formats_that_are_decoded_at_load_are_timed_once() -> None:
    formats = [WeightFormat.parse(text) for text in ("nf3-g64", "int4-g64", "fp8", "int8", "nf4-g64", "int8-g64")]
    found = {str(fmt): of for fmt, of in _representatives(formats, 64).items()}
    assert found == {
        "nf3-g64": ["nf3-g64", "fp8", "nf4-g64"],
        "int4-g64": ["int4-g64"],
        "int8": ["int8"],
        "int8-g64": [str(WeightFormat.parse("int8-g64").effective(64))],
    }


def test_timings_on_the_cpu_cover_their_model_and_plans_take_them(adapter: Adapter, quick: None) -> None:
    facts = adapter.description
    made = time_cuda(adapter, adapter.checkpoint(), "h100", gpu="X", tokens=(1, 8), contexts=(32, 64), provider="cpu")
    assert (made.device, made.backend, made.settings["gpu"]) == ("h100", "cuda", "X")
    model = facts.model
    shapes = {(m.K, m.N): (1,) if m.is_table else (1, 8) for m in model.multiplied}
    expected = {(K, N, str(f.effective(K)), t) for (K, N), rows in shapes.items() for f in facts.formats for t in rows}
    assert {(p.K, p.N, p.format, p.tokens) for p in made.products} == expected
    assert all(product.seconds > 0 for product in made.products)
    kinds = {(rest.tokens, rest.context, rest.shape[-1] > 0) for rest in made.rests}
    assert kinds == {(t, c, lora) for t in (1, 8) for c in (32, 64) for lora in (True, False)}
    path = timings_path("h100", "cuda")
    write_json(path, made, sealed=True)
    try:
        assert MeasuredLatency.load(path) == made
        plan = planner.plan(facts, device_profile("h100"), context=64, prefill=8)
        assert plan.latency_source == made.source
        assert "timings of h100 with onnxruntime" in plan.text() and "all measured there" in plan.text()
        engines = replace(made, backend="trt")
        write_json(timings_path("h100", "trt"), engines, sealed=True)  # the target's builder makes engines: they win
        space = facts.space.restrict([f for f in facts.formats if device_profile("h100").supports(f)])
        work = Workload.of(facts, 64, 1, 8)
        assert latency_of(device_profile("h100"), space, work) == engines
        assert latency_of(device_profile("h200"), space, work) != made
    finally:
        path.unlink()
        timings_path("h100", "trt").unlink(missing_ok=True)


class Pretended:
    """A GPU on which everything takes a known time; the clock goes on as it is asked to work.

    Args:
        adapter: whose model runs.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.now, self.facts = 0.0, adapter.description
        self.shape: tuple[int, int, WeightFormat, int] | None = None

    def product(self, N: int, K: int, fmt: WeightFormat, tokens: int) -> float:
        """Bytes over a bandwidth, a floor, a term of K, and float16 for what is decoded at load."""
        read = fmt.nbytes(N, K) if fmt.kind in ("int4", "int8") else 2 * N * K
        return 2e-6 + 1e-9 * K + read / 1e9 + 1e-7 * N * (tokens - 1)

    def rest(self, tokens: int, filled: int, lora: bool) -> float:
        return 3e-4 + 1e-6 * filled + 1e-5 * tokens + (2e-4 if lora else 0.0)

    def install(self, monkeypatch: pytest.MonkeyPatch, reference: QuantConfig) -> None:
        write = write_products

        def noted(directory: Path, form: GraphForm, K: int, N: int, fmt: WeightFormat, copies: int) -> Path:
            self.shape = K, N, fmt, copies
            return write(directory, form, K, N, fmt, copies)

        monkeypatch.setattr(cuda_timings, "write_products", noted)
        monkeypatch.setattr(cuda_timings, "cuda_session", lambda path, memory: _Session(self))
        gpu = self

        class Decoder(CudaDecoder):
            def run(self, tokens: Any, starts: Any, index: Any) -> Any:
                count, model = tokens.shape[1], gpu.facts.model
                for matrix in model.multiplied:
                    rows = 1 if matrix.is_table else count
                    gpu.now += gpu.product(matrix.N, matrix.K, reference[matrix.name], rows)
                gpu.now += gpu.rest(count, 0 if count > 1 else int(starts.max()), self.contract is not None)
                return np.zeros((self.batch, 1, self.io.vocabulary), np.float32)

        monkeypatch.setattr(cuda_timings, "CudaDecoder", Decoder)


class _Session:
    def __init__(self, gpu: Pretended) -> None:
        self._gpu, self._rows = gpu, 0

    def io_binding(self) -> Any:
        return self

    def bind_input(self, name: str, device: str, number: int, dtype: Any, shape: Sequence[int], address: int) -> None:
        self._rows = shape[0]

    def bind_output(self, *_: Any) -> None:
        pass

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        assert self._gpu.shape is not None
        K, N, fmt, copies = self._gpu.shape
        self._gpu.now += copies * self._gpu.product(N, K, fmt, self._rows)


def test_a_gpu_of_known_times_is_recovered_and_unseen_maps_predicted(
    adapter: Adapter, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, gpu = adapter.description, Pretended(adapter)
    reference = _smallest(facts.model, facts.formats)
    assert str(reference[facts.model.names[1]]) == "int4-g32"
    gpu.install(monkeypatch, reference)
    made = time_cuda(
        adapter,
        adapter.checkpoint(),
        "h100",
        tokens=(1, 8),
        contexts=(32, 96),
        provider="cpu",
        clock=lambda: gpu.now,
    )
    for product in made.products:
        known = gpu.product(product.N, product.K, WeightFormat.parse(product.format), product.tokens)
        assert product.seconds == pytest.approx(known, rel=1e-6)
    for rest in made.rests:
        filled = rest.context - 8 + 3.5 if rest.tokens == 1 else 0  # in the middle of the eight last tokens
        assert rest.seconds == pytest.approx(gpu.rest(rest.tokens, filled, rest.shape[-1] > 0), rel=1e-6)  # type: ignore[arg-type]
    rng, work = np.random.default_rng(0), Workload.of(facts, 96, 1, 8)
    for _ in range(5):
        choices = rng.integers(len(facts.formats), size=len(facts.space.groups))
        config = facts.space.config(choices.tolist())
        true = sum(gpu.product(m.N, m.K, config[m.name], 1) for m in facts.model.multiplied)
        found = products_seconds(made, facts.model, config, 1, 1) + made.rest_seconds(facts.model, work, 1, 96)
        assert found == pytest.approx(true + gpu.rest(1, 91.5, True), rel=1e-6)  # type: ignore[arg-type]


def test_the_graph_has_fewer_nodes_than_the_one_that_was_measured(adapter: Adapter, tmp_path: Path) -> None:
    checkpoint, facts = adapter.checkpoint(), adapter.description
    layers, counts = facts.spec.layers, []
    for name, contract in (("base", None), ("lora", facts.contract)):
        directory = tmp_path / name
        directory.mkdir()
        config = QuantConfig.uniform(facts.model, "fp16")
        export_decoder(checkpoint, config, directory, forms=[FORM], contract=contract)
        nodes = onnx.load(directory / FORM.file, load_external_data=False).graph.node
        counts.append(Counter(node.op_type for node in nodes))
    base, lora = counts
    of_layers = ("SkipSimplifiedLayerNormalization", "GroupQueryAttention", "QuickGelu", "Mul", "Split")
    assert {op: base[op] / layers for op in of_layers} == dict(zip(of_layers, (2, 1, 1, 1, 1), strict=True))
    assert base["MatMul"] == layers * 4 + 1
    outside = sum(base.values()) - sum(base[op] for op in ("MatMul", *of_layers))
    assert outside <= 8  # the embedding, the first norm, the rows that get logits, a cast
    assert sum((lora - base).values()) == layers * 4 * LORA_NODES
    # What was measured: seven products a layer, and a LoRA for each.
    now = base["MatMul"] - 1 + sum(base[op] for op in of_layers)
    assert now < layers * LAYER_NODES + len(facts.model.targets)


def test_what_cannot_be_timed_is_one_line(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="tokens and contexts must be at least 1"):
        time_cuda(adapter, adapter.checkpoint(), "h100", tokens=(), provider="cpu")

    def missing() -> None:
        raise BuildError("no NVIDIA driver here")

    monkeypatch.setattr(cuda_timings, "open_driver", missing)
    for work in (
        lambda: time_cuda(adapter, adapter.checkpoint(), "h100"),
        lambda: time_products(64, 64, WeightFormat.parse("int8"), [1]),
    ):
        with pytest.raises(BuildError, match="no NVIDIA driver here"):
            work()
