"""CPU timings: every matrix product of a configuration space, and one whole decoder, in ONNX Runtime."""

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort

from coatrt.adapter.adapter import Adapter
from coatrt.configs.config import QuantConfig
from coatrt.devices.environment import environment
from coatrt.engines.measure.bench import seconds_of
from coatrt.engines.measure.product_graph import copies_of, write_products
from coatrt.engines.measure.whole_decoders import Clock, TimedDecoder, WholeDecoders, timings_scratch, without_drift
from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.engines.runtime.ort import OrtDecoder, session
from coatrt.errors import ConfigError
from coatrt.export.decoder import decoder_io, export_decoder
from coatrt.export.graph import GraphForm
from coatrt.models.checkpoint import Checkpoint
from coatrt.planning.measured_latency import MeasuredLatency, Product
from coatrt.planning.memory import Workload
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.progress import Progress, silent

__all__ = ["adapted_decoder", "check_sizes", "time_cpu", "time_product"]

# In a decoder, a product's weight is not in the CPU cache. To reproduce that, copies of the weight are used in turn.
_WORKING_SET = 160 << 20
_COPIES = (2, 400)
_BUDGET = 0.25  # seconds of timing per product
_FORM = GraphForm("cpu", "cpu.onnx", "float32")


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
        tokens: numbers of rows.
        options: threads and accuracy level.
        clock: returns seconds; `time.thread_time` excludes time that other processes take from one thread.
    """
    products = []
    with timings_scratch() as directory:
        copies = copies_of(K, N, fmt, _WORKING_SET, _COPIES, 4)
        graph = write_products(directory, _FORM, K, N, fmt, copies)
        product_session = session(graph, options.threads, options.accuracy_level)
        for count in tokens:
            binding = product_session.io_binding()
            rng = np.random.default_rng(count)
            binding.bind_cpu_input("x", rng.normal(size=(count, K)).astype(np.float32))
            y = ort.OrtValue.ortvalue_from_numpy(np.zeros((count, N), np.float32))
            binding.bind_ortvalue_output("y", y)
            samples: list[float] = []
            start = clock()
            while len(samples) < 4 or (clock() - start < _BUDGET and len(samples) < 200):
                samples.append(seconds_of(partial(product_session.run_with_iobinding, binding), clock))
            products.append(Product(K, N, str(fmt.effective(K)), count, statistics.median(samples[1:]) / copies))
        del product_session, binding
    gc.collect()
    return products


def adapted_decoder(
    adapter: Adapter, checkpoint: Checkpoint, config: QuantConfig, directory: Path, options: RuntimeOptions
) -> OrtDecoder:
    """Return a decoder of a configuration with the adapter's LoRA bound.

    Args:
        adapter: the adapter.
        checkpoint: its model.
        config: the configuration.
        directory: an existing directory; the graph is written there unless it exists.
        options: threads, context and accuracy level.
    """
    contract = adapter.description.contract
    if not (directory / _FORM.file).exists():
        codes = adapter.codes(checkpoint)
        export_decoder(checkpoint, config, directory, forms=[_FORM], contract=contract, codes=codes)
    decoder = OrtDecoder(directory / _FORM.file, decoder_io(checkpoint, _FORM), contract, options)
    decoder.set_lora({name: value.numpy() for name, value in adapter.emit(config).items()})
    return decoder


def check_sizes(tokens: Sequence[int], contexts: Sequence[int]) -> None:
    """Refuse empty or non-positive sizes.

    Raises:
        ConfigError: `tokens` or `contexts` is empty, or has a number below 1.
    """
    if not tokens or not contexts or min(*tokens, *contexts) < 1:
        raise ConfigError(f"tokens and contexts must be at least 1, got {list(tokens)} and {list(contexts)}")


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
    """Return the CPU timings of this machine for an adapter's model.

    The "rest" of a call is the time of a whole decoder, with every matrix in the first format, minus its products.

    Args:
        adapter: gives the model, its formats and the LoRA.
        checkpoint: the adapter's model.
        options: threads and accuracy level.
        tokens: rows of the products: 1 for decode, more for prefill.
        contexts: KV cache slots.
        clock: see `time_product`.
        progress: called after each measurement.

    Raises:
        ConfigError: `tokens` or `contexts` is empty, or has a number below 1.
    """
    check_sizes(tokens, contexts)
    formats, model = adapter.description.formats, adapter.description.model
    shapes = {(matrix.K, matrix.N): matrix.is_table for matrix in model.multiplied}
    total, batches = len(shapes) * len(formats) + 1, []
    reference = QuantConfig.uniform(model, formats[0])
    with timings_scratch() as directory:
        decoders = {}
        for context in contexts:
            decoder = adapted_decoder(adapter, checkpoint, reference, directory, replace(options, context=context))
            decoders[decoder.capacity] = decoder
        subjects = [TimedDecoder(decoder, slots) for slots, decoder in decoders.items()]
        whole = WholeDecoders(subjects, max(tokens), clock)
        whole.time()
        for (K, N), table in shapes.items():
            rows = (1,) if table else tuple(sorted(set(tokens)))
            for fmt in formats:
                batches.append(time_product(K, N, fmt, rows, options=options, clock=clock))
                whole.time()
                progress(len(batches), total, "products")
    facts = environment()
    settings = {
        "threads": options.threads or facts["cores"],
        "accuracy_level": options.accuracy_level,
        "activations": _FORM.activations,
        "processor": facts["cpu"],
    }
    products = tuple(without_drift(batches, whole.reference_seconds))
    timings = MeasuredLatency("cpu", f"onnxruntime {ort.__version__}", settings, products, ())
    progress(total, total, "products")
    workload = Workload.of(adapter.description, max(contexts), 1, max(tokens), np.dtype(_FORM.activations).itemsize)
    return replace(timings, rests=tuple(whole.rests(timings, model, workload, reference)))
