"""Timings of this machine's CPU: every product of a model's space, and one whole decoder, in ONNX Runtime."""

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from coatrt.adapter.adapter import Adapter
from coatrt.configs.config import QuantConfig
from coatrt.devices.environment import environment
from coatrt.engines.measure.bench import timed
from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.engines.runtime.ort import OrtDecoder, session
from coatrt.errors import ConfigError
from coatrt.export.decoder import decoder_io, export_decoder
from coatrt.export.graph import GraphBuilder, GraphForm
from coatrt.export.weight_file import WeightFile
from coatrt.export.weights import write_matrix
from coatrt.models.checkpoint import Checkpoint
from coatrt.planning.latency import products_seconds
from coatrt.planning.measured_latency import MeasuredLatency, Product, Rest, shape_of
from coatrt.planning.memory import Workload
from coatrt.quantization.codec import encode
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.disk import writing
from coatrt.system.progress import Progress, silent
from coatrt.system.scratch import scratch

__all__ = ["Clock", "adapted_decoder", "decode_seconds", "time_cpu", "time_product"]

Clock = Callable[[], float]

# A product of the decoder finds its weight outside the cache: copies of it, with other bytes (a weights file stores
# equal ones once), take turns.
_WORKING_SET = 160 << 20
_COPIES = (2, 400)
_BUDGET = 0.25  # seconds of timing for a product
_STEPS = 8  # tokens decoded to time one
_FORM = GraphForm("cpu", "cpu.onnx", "float32")


def _product_graph(directory: Path, K: int, N: int, fmt: WeightFormat) -> tuple[Path, int]:
    """Write y = Σ x·W_i with as many copies of one weight as fill the working set; return the file and their number."""
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) / K**0.5
    matrix = encode(weight, fmt, "absmax")
    stored = fmt.nbytes(N, K) if fmt.kind in ("int4", "int8") else 4 * N * K
    copies = int(min(max(_WORKING_SET // stored, _COPIES[0]), _COPIES[1]))
    with WeightFile(directory) as weights:
        graph = GraphBuilder(_FORM, weights)
        x = graph.input("x", graph.activations, ["T", K])
        parts = []
        for copy in range(copies):
            turned = replace(matrix, codes=_turned(matrix.codes, copy))
            parts.append(graph.op("MatMul", [x, write_matrix(graph, f"w{copy}", turned)], f"y{copy}"))
        total = graph.op("Sum", parts, "y")
        graph.output(total, graph.activations, ["T", N])
    graph.save(directory)
    return directory / _FORM.file, copies


def _turned(codes: torch.Tensor, rows: int) -> torch.Tensor:
    """Return codes with their rows turned; 8-bit floats turn as bytes."""
    plain = codes.view(torch.uint8) if codes.element_size() == 1 else codes
    return plain.roll(rows, 0).view(codes.dtype)


@contextmanager
def _scratch() -> Iterator[Path]:
    folder = Path(tempfile.gettempdir())
    with writing(folder), scratch(folder, "timings") as place:
        yield place


def time_product(
    K: int,
    N: int,
    fmt: WeightFormat,
    tokens: Sequence[int],
    *,
    options: RuntimeOptions = RuntimeOptions(),
    clock: Clock = time.perf_counter,
) -> list[Product]:
    """Return the timings of one product for several numbers of rows.

    Args:
        K: input width.
        N: output width.
        fmt: the weight's format.
        tokens: rows.
        options: threads and accuracy level.
        clock: seconds; `time.thread_time` leaves out what other processes took from one thread.
    """
    found = []
    with _scratch() as place:
        path, copies = _product_graph(place, K, N, fmt)
        made = session(path, options.threads, options.accuracy_level)
        for count in tokens:
            binding = made.io_binding()
            rng = np.random.default_rng(count)
            binding.bind_cpu_input("x", rng.normal(size=(count, K)).astype(np.float32))
            y = ort.OrtValue.ortvalue_from_numpy(np.zeros((count, N), np.float32))
            binding.bind_ortvalue_output("y", y)
            samples: list[float] = []
            started = clock()
            while len(samples) < 4 or (clock() - started < _BUDGET and len(samples) < 200):
                samples.append(timed(partial(made.run_with_iobinding, binding), clock))
            found.append(Product(K, N, str(fmt.effective(K)), count, statistics.median(samples[1:]) / copies))
        del made, binding
    gc.collect()
    return found


def adapted_decoder(
    adapter: Adapter, checkpoint: Checkpoint, config: QuantConfig, directory: Path, options: RuntimeOptions
) -> OrtDecoder:
    """Return a decoder of a configuration with the adapter's LoRA bound.

    Args:
        adapter: the adapter.
        checkpoint: its model.
        config: the configuration.
        directory: an existing directory for the graph, which is written where it is not there yet.
        options: threads, context and accuracy level.
    """
    contract = adapter.description.contract
    if not (directory / _FORM.file).exists():
        codes = adapter.codes(checkpoint)
        export_decoder(checkpoint, config, directory, forms=[_FORM], contract=contract, codes=codes)
    decoder = OrtDecoder(directory / _FORM.file, decoder_io(checkpoint, _FORM), contract, options)
    decoder.set_lora({name: value.numpy() for name, value in adapter.emit(config).items()})
    return decoder


def decode_seconds(decoder: OrtDecoder, clock: Clock = time.perf_counter) -> float:
    """Return the median seconds of decoding one token per sequence, the cache full but for the tokens decoded here."""
    io, filled = decoder.io, max(decoder.capacity - _STEPS - 2, 0)
    cache = np.zeros((decoder.batch, io.kv_heads, filled, io.head_dim), io.activations)
    decoder.restore((np.full(decoder.batch, filled, np.int64), [cache] * (2 * io.layers)))
    steps = range(5, 5 + _STEPS + 2)
    samples = [timed(partial(decoder.decode, [token] * decoder.batch), clock) for token in steps]
    return statistics.median(samples[2:])


def _prefill_seconds(decoder: OrtDecoder, tokens: int, clock: Clock) -> float:
    prefill = partial(decoder.prefill, [[1 + i % 100 for i in range(tokens)]])
    samples = [timed(prefill, clock) for _ in range(4)]
    return statistics.median(samples[1:])


def time_cpu(
    adapter: Adapter,
    checkpoint: Checkpoint,
    options: RuntimeOptions = RuntimeOptions(),
    *,
    tokens: Sequence[int] = (1, 64),
    contexts: Sequence[int] = (128, 2048),
    clock: Clock = time.perf_counter,
    progress: Progress = silent,
) -> MeasuredLatency:
    """Return the timings of this machine for an adapter's model.

    The rest of a call is what a whole decoder, every matrix in the first format, takes beyond its products.

    Args:
        adapter: gives the model, its formats and the LoRA.
        checkpoint: its model.
        options: threads and accuracy level.
        tokens: rows of the products: 1, and more than one for prefill.
        contexts: slots of the caches.
        clock: see `time_product`.
        progress: called after each measurement.

    Raises:
        ConfigError: fewer than one number of tokens or slots is given.
    """
    if not tokens or not contexts or min(*tokens, *contexts) < 1:
        raise ConfigError(f"tokens and contexts must be positive numbers, got {list(tokens)} and {list(contexts)}")
    formats, model = adapter.description.formats, adapter.description.model
    shapes = {(matrix.K, matrix.N): matrix.is_table for matrix in model.multiplied}
    total, timed = len(shapes) * len(formats) + 1, []
    reference = QuantConfig.uniform(model, formats[0])
    with _scratch() as place:
        decoders = [
            adapted_decoder(adapter, checkpoint, reference, place, replace(options, context=context))
            for context in contexts
        ]
        whole = _WholeDecoders(decoders, max(tokens), clock)
        whole.time()
        for (K, N), table in shapes.items():
            rows = (1,) if table else tuple(sorted(set(tokens)))
            for fmt in formats:
                timed.append(time_product(K, N, fmt, rows, options=options, clock=clock))
                whole.time()
                progress(len(timed), total, "products")
    facts = environment()
    settings = {
        "threads": options.threads or facts["cores"],
        "accuracy_level": options.accuracy_level,
        "activations": _FORM.activations,
        "processor": facts["cpu"],
    }
    products = tuple(_without_drift(timed, whole.beside))
    timings = MeasuredLatency("cpu", f"onnxruntime {ort.__version__}", settings, products, ())
    progress(total, total, "products")
    return replace(timings, rests=tuple(whole.rests(timings, adapter, reference)))


class _WholeDecoders:
    """One decoder for each number of slots, timed again and again beside the products."""

    def __init__(self, decoders: Sequence[OrtDecoder], prompt: int, clock: Clock) -> None:
        self._decoders = {decoder.capacity: decoder for decoder in decoders}
        self._prompt, self._clock = prompt, clock
        self._seconds: dict[tuple[int, int], list[float]] = {}

    def time(self) -> None:
        """Time a decoded token, and a prompt where prompts are asked for."""
        for context, decoder in self._decoders.items():
            self._seconds.setdefault((1, context), []).append(decode_seconds(decoder, self._clock))
            if self._prompt > 1:
                count = min(self._prompt, decoder.capacity)
                seconds = _prefill_seconds(decoder, count, self._clock)
                self._seconds.setdefault((count, context), []).append(seconds)

    @property
    def beside(self) -> list[float]:
        """Seconds of a decoded token with the first number of slots, by time."""
        return self._seconds[1, next(iter(self._decoders))]

    def rests(self, timings: MeasuredLatency, adapter: Adapter, reference: QuantConfig) -> Iterator[Rest]:
        """Yield what each kind of call takes beyond its products."""
        for (count, context), samples in self._seconds.items():
            work = Workload.of(adapter.description, context, 1, count, np.dtype(_FORM.activations).itemsize)
            known = products_seconds(timings, adapter.description.model, reference, count, 1)
            yield Rest(shape_of(work), count, context, statistics.median(samples) - known)


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
