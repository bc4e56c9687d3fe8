"""GPU timings in ONNX Runtime's CUDA provider: every matrix product of a configuration space, and whole decode steps.

A product is timed in a graph of many copies, each with its own weight, replayed as a CUDA graph: so its time includes
neither hits in the L2 cache nor launches by the host.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort

from coatrt.adapter.adapter import Adapter
from coatrt.configs.config import QuantConfig
from coatrt.engines.measure.cpu_timings import check_sizes
from coatrt.engines.measure.product_graph import copies_of, write_products
from coatrt.engines.measure.whole_decoders import Clock, TimedDecoder, WholeDecoders, timings_scratch, without_drift
from coatrt.engines.runtime.cuda import CudaDecoder
from coatrt.engines.runtime.cuda_driver import DeviceMemory, open_driver
from coatrt.engines.runtime.cuda_memory import device_weights
from coatrt.engines.runtime.cuda_session import check_provider, cuda_session
from coatrt.engines.runtime.memory import HostMemory, Memory
from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.engines.runtime.state import StatefulDecoder
from coatrt.export.decoder import decoder_io, export_decoder
from coatrt.export.graph import GraphForm
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.matrices import ModelMatrices
from coatrt.planning.engine_size import CPU_PACKED
from coatrt.planning.measured_latency import MeasuredLatency, Product
from coatrt.planning.memory import Workload
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.progress import Progress, silent

__all__ = ["Provider", "time_cuda", "time_products", "time_space"]

Provider = Literal["cuda", "cpu"]
""""cpu" runs the same computation on the CPU, for tests."""

_WORKING_SET = 256 << 20  # several times the L2 cache of any GPU
_COPIES = (2, 256)
_BUDGET = 0.15  # seconds of timing per product
_REPLAYS = 10  # launched in a row, so that the GPU never waits for the host
_WARMUP = 3  # runs in which the graph is captured
_FORM = GraphForm("cuda", "cuda.onnx", "float16")
_HALF = np.dtype(np.float16)


def _memory(provider: Provider) -> Memory:
    if provider == "cpu":
        return HostMemory()
    driver = open_driver()
    check_provider(driver)
    return DeviceMemory(driver)


def time_products(
    K: int,
    N: int,
    fmt: WeightFormat,
    tokens: Sequence[int],
    *,
    provider: Provider = "cuda",
    clock: Clock = time.perf_counter,
) -> list[Product]:
    """Return the timings of one product for several numbers of rows.

    Args:
        K: input width.
        N: output width.
        fmt: the weight's format.
        tokens: numbers of rows.
        provider: "cuda", or "cpu" for tests.
        clock: returns seconds.

    Raises:
        BuildError: there is no GPU that ONNX Runtime supports.
    """
    memory, products = _memory(provider), []
    with timings_scratch() as directory:
        copies = copies_of(K, N, fmt, _WORKING_SET, _COPIES, _HALF.itemsize)
        session = cuda_session(write_products(directory, _FORM, K, N, fmt, copies), memory)
        for number, count in enumerate(tokens, 1):
            run = _runner(session, memory, K, N, count, copies, number)
            seconds = _run_seconds(run, memory, clock) / copies
            products.append(Product(K, N, str(fmt.effective(K)), count, seconds))
        del session, run
    gc.collect()  # frees the buffers with the memory
    return products


def _runner(session: Any, memory: Memory, K: int, N: int, count: int, copies: int, number: int) -> Any:
    """Return a function that runs the graph with `count` rows, on a GPU as CUDA graph `number`."""
    x = np.random.default_rng(count).normal(size=(count, K)).astype(_HALF)
    source, target = memory.allocate(x.nbytes), memory.allocate(count * N * _HALF.itemsize)
    memory.write(source, x)
    memory.synchronize()
    binding, options = session.io_binding(), ort.RunOptions()
    binding.bind_input("x", memory.device, 0, _HALF.type, [count, K], source)
    for copy in range(copies):  # outputs may share a buffer: the stream runs the products one after another
        binding.bind_output(f"y{copy}", memory.device, 0, _HALF.type, [count, N], target)
    if memory.device == "cuda":
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        options.add_run_config_entry("gpu_graph_id", str(number))
    return lambda: session.run_with_iobinding(binding, options)


def _run_seconds(run: Any, memory: Memory, clock: Clock) -> float:
    """Return the median seconds of a run; the host waits only once per `_REPLAYS` runs."""
    for _ in range(_WARMUP):
        run()
    memory.synchronize()
    samples: list[float] = []
    start = clock()
    while len(samples) < 3 or (clock() - start < _BUDGET and len(samples) < 50):
        sample_start = clock()
        for _ in range(_REPLAYS):
            run()
        memory.synchronize()
        samples.append((clock() - sample_start) / _REPLAYS)
    return statistics.median(samples)


def _decoder(
    adapter: Adapter,
    checkpoint: Checkpoint,
    config: QuantConfig,
    root: Path,
    context: int,
    lora: bool,
    provider: Provider,
) -> CudaDecoder:
    """Return a decoder of a configuration, with the adapter's LoRA bound or with a graph without LoRA."""
    contract = adapter.description.contract if lora else None
    directory = root / ("lora" if lora else "base")
    directory.mkdir()
    codes = adapter.codes(checkpoint)
    export_decoder(checkpoint, config, directory, forms=[_FORM], contract=contract, codes=codes)
    weights = device_weights(config, adapter.description.model).nbytes
    decoder = CudaDecoder(
        directory / _FORM.file,
        decoder_io(checkpoint, _FORM),
        contract,
        RuntimeOptions(context=context),
        weight_bytes=weights,
        provider=provider,
    )
    if lora:
        decoder.set_lora({name: value.numpy() for name, value in adapter.emit(config).items()})
    return decoder


def _smallest(model: ModelMatrices, formats: Sequence[WeightFormat]) -> QuantConfig:
    """Return the single-format configuration that needs the least GPU memory."""
    uniform = [QuantConfig.uniform(model, fmt) for fmt in formats]
    return min(uniform, key=lambda config: device_weights(config, model).nbytes)


def _representatives(formats: Sequence[WeightFormat], K: int) -> dict[WeightFormat, list[str]]:
    """Return the formats to time, each with the effective formats at this K that share its timing.

    All formats that are decoded when the graph loads share one, as they run the same float16 product.
    """
    groups: dict[str, tuple[WeightFormat, list[str]]] = {}
    for fmt in formats:
        text = str(fmt.effective(K))
        group = groups.setdefault(text if fmt.kind in CPU_PACKED else "float16", (fmt, []))
        if text not in group[1]:
            group[1].append(text)
    return dict(groups.values())


def time_cuda(
    adapter: Adapter,
    checkpoint: Checkpoint,
    device: str,
    *,
    gpu: str = "",
    tokens: Sequence[int] = (1, 16, 64, 512),
    contexts: Sequence[int] = (128, 2048),
    provider: Provider = "cuda",
    clock: Clock = time.perf_counter,
    progress: Progress = silent,
) -> MeasuredLatency:
    """Return the timings of this machine's GPU for an adapter's model; see `time_space`.

    Args:
        adapter: gives the model, its formats and the LoRA.
        checkpoint: the adapter's model.
        device: id of the GPU's profile.
        gpu: the GPU's name from the driver.
        tokens: rows of the products: 1 for decode, more for batches and prefill.
        contexts: KV cache slots filled at a decode step.
        provider: "cuda", or "cpu" for tests.
        clock: returns seconds.
        progress: called after each measurement.

    Raises:
        BuildError: there is no GPU that ONNX Runtime supports, or not enough GPU memory.
        ConfigError: `tokens` or `contexts` is empty, or has a number below 1.
    """
    check_sizes(tokens, contexts)
    facts = adapter.description
    workload = Workload.of(facts, min(max(contexts), facts.spec.max_positions), 1, max(tokens))
    with timings_scratch() as directory:

        def decoder_of(config: QuantConfig, lora: bool) -> StatefulDecoder:
            return _decoder(adapter, checkpoint, config, directory, max(contexts), lora, provider)

        return time_space(
            facts.model,
            facts.formats,
            workload,
            decoder_of,
            device,
            gpu=gpu,
            tokens=tokens,
            contexts=contexts,
            provider=provider,
            clock=clock,
            progress=progress,
        )


def time_space(
    model: ModelMatrices,
    formats: Sequence[WeightFormat],
    workload: Workload,
    decoder_of: Callable[[QuantConfig, bool], StatefulDecoder],
    device: str,
    *,
    gpu: str,
    tokens: Sequence[int],
    contexts: Sequence[int],
    provider: Provider = "cuda",
    clock: Clock = time.perf_counter,
    progress: Progress = silent,
) -> MeasuredLatency:
    """Return the timings of a model's products in some formats, and of the rest of a call.

    The rest is the time of a whole decoder minus its products, measured with the LoRA and in a graph without one.

    Args:
        model: the matrices.
        formats: formats of the configuration space.
        workload: workload of the decoder with its LoRA.
        decoder_of: (configuration, with LoRA or not) → a decoder of the model.
        device: see `time_cuda`.
        gpu: see `time_cuda`.
        tokens: see `time_cuda`.
        contexts: see `time_cuda`.
        provider: see `time_cuda`.
        clock: see `time_cuda`.
        progress: see `time_cuda`.

    Raises:
        BuildError: there is no GPU that ONNX Runtime supports, or not enough GPU memory.
    """
    _memory(provider)  # fails without a GPU, before anything is written
    shapes = {(matrix.K, matrix.N): matrix.is_table for matrix in model.multiplied}
    work = [
        (K, N, table, fmt, texts)
        for (K, N), table in shapes.items()
        for fmt, texts in _representatives(formats, K).items()
    ]
    reference, batches, decoders = _smallest(model, formats), [], []
    for lora in (True, False):
        decoder = decoder_of(reference, lora)
        slots = sorted({min(context, decoder.capacity) for context in contexts})
        decoders += [TimedDecoder(decoder, context, lora) for context in slots]
    whole = WholeDecoders(decoders, max(tokens), clock)
    whole.time()
    for K, N, table, fmt, texts in work:
        rows = (1,) if table else tuple(sorted(set(tokens)))
        timings_of_rows = time_products(K, N, fmt, rows, provider=provider, clock=clock)
        batches.append([replace(product, format=text) for text in texts for product in timings_of_rows])
        whole.time()
        progress(len(batches), len(work), "products")
    settings = {"gpu": gpu or device, "activations": _FORM.activations}
    products = tuple(without_drift(batches, whole.reference_seconds))
    timings = MeasuredLatency(device, f"onnxruntime {ort.__version__}, CUDA provider", settings, products, (), "cuda")
    return replace(timings, rests=tuple(whole.rests(timings, model, workload, reference)))
