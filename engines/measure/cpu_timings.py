"""Calibration of this machine's CPU: every product of a model's space, and one whole decoder, timed in ONNX Runtime."""

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from coatrt.adapter.adapter import Adapter
from coatrt.configs.config import QuantConfig
from coatrt.devices.environment import environment
from coatrt.engines.runtime.ort import OrtDecoder, session
from coatrt.errors import ConfigError
from coatrt.export.decoder import decoder_io, export_decoder
from coatrt.export.graph import GraphBuilder, GraphForm
from coatrt.export.weight_file import WeightFile
from coatrt.export.weights import write_matrix
from coatrt.models.checkpoint import Checkpoint
from coatrt.planning.measured_latency import Calibrated, Product, Rest, shape_of
from coatrt.planning.workload import Workload
from coatrt.quantization.codec import encode
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.progress import Progress, silent

__all__ = [
    "Clock",
    "calibrate_cpu",
    "decode_seconds",
    "export_reference",
    "predicted_decode",
    "time_product",
]

Clock = Callable[[], float]

# A product of the decoder finds its weight outside the cache: copies of it, with other bytes (a weights file stores
# equal ones once), take turns.
_WORKING_SET = 160 << 20
_COPIES = (2, 400)
_BUDGET = 0.25  # seconds of timing for a product


def _product_graph(directory: Path, K: int, N: int, fmt: WeightFormat, activations: str) -> tuple[Path, int]:
    """Write y = Σ x·W_i with as many copies of one weight as fill the working set; return the file and their number."""
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) / K**0.5
    matrix = encode(weight, fmt, "absmax")
    stored = fmt.nbytes(N, K) if fmt.kind in ("int4", "int8") else 4 * N * K
    copies = int(min(max(_WORKING_SET // stored, _COPIES[0]), _COPIES[1]))
    form = GraphForm("cpu", "product.onnx", activations)
    with WeightFile(directory) as weights:
        graph = GraphBuilder(form, weights)
        x = graph.input("x", graph.activations, ["T", K])
        parts = []
        for copy in range(copies):
            turned = replace(matrix, codes=_turned(matrix.codes, copy))
            parts.append(graph.op("MatMul", [x, write_matrix(graph, f"w{copy}", turned)], f"y{copy}"))
        total = graph.op("Sum", parts, "y")
        graph.output(total, graph.activations, ["T", N])
    graph.save(directory)
    return directory / form.file, copies


def _turned(codes: torch.Tensor, rows: int) -> torch.Tensor:
    """Return codes with their rows turned; 8-bit floats turn as bytes."""
    plain = codes.view(torch.uint8) if codes.element_size() == 1 else codes
    return plain.roll(rows, 0).view(codes.dtype)


def time_product(
    K: int,
    N: int,
    fmt: WeightFormat,
    tokens: Sequence[int],
    *,
    threads: int | None = None,
    accuracy_level: int = 0,
    activations: str = "float32",
    clock: Clock = time.perf_counter,
) -> list[Product]:
    """Return the timings of one product for several numbers of rows.

    Args:
        K: input width.
        N: output width.
        fmt: the weight's format.
        tokens: rows.
        threads: of the session.
        accuracy_level: see `coatrt.engines.runtime.ort.session`.
        activations: float32 or float16.
        clock: seconds; `time.thread_time` leaves out what other processes took from one thread.
    """
    found = []
    with tempfile.TemporaryDirectory(prefix="coatrt-calibrate-") as scratch:
        path, copies = _product_graph(Path(scratch), K, N, fmt, activations)
        made = session(path, threads, accuracy_level)
        for count in tokens:
            binding = made.io_binding()
            rng = np.random.default_rng(count)
            x = rng.normal(size=(count, K)).astype(activations)
            binding.bind_cpu_input("x", x)
            y = ort.OrtValue.ortvalue_from_numpy(np.zeros((count, N), activations))
            binding.bind_ortvalue_output("y", y)
            samples: list[float] = []
            started = clock()
            while len(samples) < 4 or (clock() - started < _BUDGET and len(samples) < 200):
                before = clock()
                made.run_with_iobinding(binding)
                samples.append(clock() - before)
            found.append(Product(K, N, str(fmt.effective(K)), count, statistics.median(samples[1:]) / copies))
        del made, binding
    gc.collect()
    return found


def export_reference(
    adapter: Adapter, checkpoint: Checkpoint, config: QuantConfig, directory: Path, activations: str = "float32"
) -> Path:
    """Write the cpu form of a configuration with the adapter's LoRA inputs, and return the graph file."""
    form = GraphForm("cpu", "cpu.onnx", activations)
    codes = adapter.codes(checkpoint)
    export_decoder(checkpoint, config, directory, forms=[form], contract=adapter.contract, codes=codes)
    return directory / form.file


def decode_seconds(decoder: OrtDecoder, steps: int = 12, clock: Clock = time.perf_counter) -> float:
    """Return the median seconds of decoding one token per sequence, the cache full but for these steps."""
    io, filled = decoder.io, max(decoder.capacity - steps - 2, 0)
    cache = np.zeros((decoder.batch, io.kv_heads, filled, io.head_dim), io.activations)
    decoder.restore((np.full(decoder.batch, filled, np.int64), [cache] * (2 * io.layers)))
    samples = []
    for step in range(steps + 2):
        before = clock()
        decoder.decode([5 + step] * decoder.batch)
        samples.append(clock() - before)
    return statistics.median(samples[2:])


def _prefill_seconds(decoder: OrtDecoder, tokens: int, clock: Clock) -> float:
    prompt, samples = [[1 + i % 100 for i in range(tokens)]], []
    for _ in range(4):
        before = clock()
        decoder.prefill(prompt)
        samples.append(clock() - before)
    return statistics.median(samples[1:])


def calibrate_cpu(
    adapter: Adapter,
    checkpoint: Checkpoint,
    *,
    formats: Sequence[WeightFormat] | None = None,
    tokens: Sequence[int] = (1, 64),
    contexts: Sequence[int] = (128, 2048),
    threads: int | None = None,
    accuracy_level: int = 0,
    activations: str = "float32",
    clock: Clock = time.perf_counter,
    progress: Progress = silent,
) -> Calibrated:
    """Return the calibration of this machine for an adapter's model.

    The rest of a call is what a whole decoder, every matrix in the first format, takes beyond its products.

    Args:
        adapter: gives the model, its formats and the LoRA.
        checkpoint: its model.
        formats: formats to measure; by default the adapter's.
        tokens: rows of the products: 1, and more than one for prefill.
        contexts: slots of the caches.
        threads: of the sessions.
        accuracy_level: see `coatrt.engines.runtime.ort.session`.
        activations: float32 or float16.
        clock: see `time_product`.
        progress: called after each measurement.

    Raises:
        ConfigError: fewer than one number of tokens or slots is given.
    """
    if not tokens or not contexts or min(*tokens, *contexts) < 1:
        raise ConfigError(f"tokens {list(tokens)} and contexts {list(contexts)} are given; give positive numbers")
    formats, model = tuple(formats or adapter.formats), adapter.model
    shapes = {
        (matrix.K, matrix.N): matrix.is_table
        for matrix in model.matrices
        if model.tied or matrix.name != model.names[0]
    }
    reference = QuantConfig.uniform(model, formats[0])
    total = len(shapes) * len(formats) + len(contexts) + 1
    timed: list[list[Product]] = []
    settings = {"threads": threads, "accuracy_level": accuracy_level, "activations": activations}
    done = 0
    with tempfile.TemporaryDirectory(prefix="coatrt-calibrate-") as scratch:
        graph = export_reference(adapter, checkpoint, reference, Path(scratch), activations)
        io = decoder_io(checkpoint, GraphForm("cpu", "cpu.onnx", activations))
        decoders = {
            context: OrtDecoder(
                graph, io, adapter.contract, context=context, threads=threads, accuracy_level=accuracy_level
            )
            for context in dict.fromkeys(min(context, io.max_positions) for context in contexts)
        }
        lora = {name: value.numpy() for name, value in adapter.emit(reference).items()}
        whole: dict[tuple[int, int], list[float]] = {}
        for decoder in decoders.values():
            decoder.set_lora(lora)

        def time_decoders() -> None:
            for context, decoder in decoders.items():
                whole.setdefault((1, context), []).append(decode_seconds(decoder, 8, clock))
                if len(tokens) > 1:
                    count = min(max(tokens), decoder.capacity)
                    whole.setdefault((count, context), []).append(_prefill_seconds(decoder, count, clock))

        time_decoders()
        for (K, N), table in shapes.items():
            for fmt in formats:
                rows = (1,) if table else tuple(sorted(set(tokens)))
                timed.append(time_product(K, N, fmt, rows, clock=clock, **settings))  # type: ignore[arg-type]
                time_decoders()
                done += 1
                progress(done, total, "products")
    products = _without_drift(timed, whole[1, next(iter(decoders))])
    lora_size = sum(rows * columns for rows, columns in adapter.contract.shapes.values())
    facts = environment()
    made = Calibrated(
        "cpu",
        f"onnxruntime {ort.__version__}",
        {**settings, "threads": threads or facts["cores"], "processor": facts["cpu"]},
        tuple(products),
        (),
    )
    rests = []
    for (count, context), samples in whole.items():
        work = Workload.of(adapter.model_config, context, 1, count, lora_size, np.dtype(activations).itemsize)
        known = sum(
            made.matrix_seconds(matrix.N, matrix.K, reference[matrix.name], 1 if matrix.is_table else count)
            for matrix in model.matrices
            if model.tied or matrix.name != model.names[0]
        )
        rests.append(Rest(shape_of(work), count, context, statistics.median(samples) - known))
    progress(total, total, "products")
    return Calibrated(made.device, made.runtime, made.settings, made.products, tuple(rests))


def _without_drift(timed: list[list[Product]], beside: list[float]) -> list[Product]:
    """Return the products as they would be at the machine's median speed.

    Args:
        timed: products in the order of time.
        beside: seconds of one and the same decoder before the first, between any two and after the last.
    """
    middle = statistics.median(beside)
    return [
        replace(product, seconds=product.seconds * 2 * middle / (before + after))
        for found, before, after in zip(timed, beside, beside[1:], strict=False)
        for product in found
    ]


def predicted_decode(calibration: Calibrated, adapter: Adapter, config: QuantConfig, context: int) -> float:
    """Return what a calibration predicts for decoding a token with a configuration."""
    lora = sum(rows * columns for rows, columns in adapter.contract.shapes.values())
    work = Workload.of(adapter.model_config, context, 1, 1, lora, 4)
    model = adapter.model
    return calibration.rest_seconds(model, work, 1, context) + sum(
        calibration.matrix_seconds(matrix.N, matrix.K, config[matrix.name], 1)
        for matrix in model.matrices
        if model.tied or matrix.name != model.names[0]
    )
