"""Timings of this machine's GPU in ONNX Runtime's CUDA provider: every product of a space, and whole decode steps.

A product is timed as many of it, each with a weight of its own, in a graph that is replayed as a CUDA graph: neither
the L2 cache nor launches by the host are in its time.
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
from coatrt.engines.measure.whole_decoders import Clock, Timed, WholeDecoders, timings_scratch, without_drift
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
"""cpu computes the same on the CPU, for tests."""

_WORKING_SET = 256 << 20  # several times the L2 cache of any GPU
_COPIES = (2, 256)
_BUDGET = 0.15  # seconds of timing for a product
_REPLAYS = 10  # started in a row, so that the GPU has always work
_WARM = 3  # the graph is captured in these
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
        tokens: rows.
        provider: "cuda", or "cpu" for tests.
        clock: seconds.

    Raises:
        BuildError: no GPU that ONNX Runtime serves.
    """
    memory, found = _memory(provider), []
    with timings_scratch() as place:
        copies = copies_of(K, N, fmt, _WORKING_SET, _COPIES, _HALF.itemsize)
        made = cuda_session(write_products(place, _FORM, K, N, fmt, copies), memory)
        for number, count in enumerate(tokens, 1):
            run = _bound(made, memory, K, N, count, copies, number)
            seconds = _seconds_of_a_run(run, memory, clock) / copies
            found.append(Product(K, N, str(fmt.effective(K)), count, seconds))
        del made, run
    gc.collect()  # buffers go with the memory
    return found


def _bound(made: Any, memory: Memory, K: int, N: int, count: int, copies: int, number: int) -> Any:
    """Return what runs the graph with so many rows; on a GPU as the CUDA graph of that number."""
    x = np.random.default_rng(count).normal(size=(count, K)).astype(_HALF)
    given, taken = memory.allocate(x.nbytes), memory.allocate(count * N * _HALF.itemsize)
    memory.write(given, x)
    memory.synchronize()
    binding, options = made.io_binding(), ort.RunOptions()
    binding.bind_input("x", memory.device, 0, _HALF.type, [count, K], given)
    for copy in range(copies):  # all into one buffer: the stream runs them one after another
        binding.bind_output(f"y{copy}", memory.device, 0, _HALF.type, [count, N], taken)
    if memory.device == "cuda":
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        options.add_run_config_entry("gpu_graph_id", str(number))
    return lambda: made.run_with_iobinding(binding, options)


def _seconds_of_a_run(run: Any, memory: Memory, clock: Clock) -> float:
    """Return the median seconds of a run among many in a row: the host waits once for all of a row."""
    for _ in range(_WARM):
        run()
    memory.synchronize()
    samples: list[float] = []
    started = clock()
    while len(samples) < 3 or (clock() - started < _BUDGET and len(samples) < 50):
        began = clock()
        for _ in range(_REPLAYS):
            run()
        memory.synchronize()
        samples.append((clock() - began) / _REPLAYS)
    return statistics.median(samples)


def _decoder(
    adapter: Adapter,
    checkpoint: Checkpoint,
    config: QuantConfig,
    place: Path,
    context: int,
    lora: bool,
    provider: Provider,
) -> CudaDecoder:
    """Return a decoder of a configuration, with the adapter's LoRA bound or with a graph that has none."""
    contract = adapter.description.contract if lora else None
    directory = place / ("lora" if lora else "base")
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
    """Return the configuration in one format that takes the least memory on the GPU."""
    uniform = [QuantConfig.uniform(model, fmt) for fmt in formats]
    return min(uniform, key=lambda config: device_weights(config, model).nbytes)


def _timed_as(formats: Sequence[WeightFormat], K: int) -> dict[WeightFormat, list[str]]:
    """Return the formats to time and, of each, those it stands for: all that are decoded at load run the same product.

    Formats stand for those with the same effective format at this K, too.
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
        checkpoint: its model.
        device: id of the GPU's profile.
        gpu: its name as the driver has it.
        tokens: rows of the products: 1, and more than one for batches and prefill.
        contexts: slots filled when a token is decoded.
        provider: "cuda", or "cpu" for tests.
        clock: seconds.
        progress: called after each measurement.

    Raises:
        BuildError: no GPU that ONNX Runtime serves, or not enough memory on it.
        ConfigError: fewer than one number of tokens or slots is given.
    """
    check_sizes(tokens, contexts)
    facts = adapter.description
    workload = Workload.of(facts, min(max(contexts), facts.spec.max_positions), 1, max(tokens))
    with timings_scratch() as place:

        def decoder_of(config: QuantConfig, lora: bool) -> StatefulDecoder:
            return _decoder(adapter, checkpoint, config, place, max(contexts), lora, provider)

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
    """Return the timings of a model's products in some formats, and of all else.

    The rest of a call is what a whole decoder takes beyond its products, with the LoRA and in a graph without one.

    Args:
        model: the matrices.
        formats: of the space.
        workload: of the decoder with its LoRA.
        decoder_of: (configuration, whether it has a LoRA) → a decoder of the model.
        device: see `time_cuda`, as all else.
        gpu: name.
        tokens: rows.
        contexts: slots.
        provider: "cuda", or "cpu" for tests.
        clock: seconds.
        progress: called after each measurement.

    Raises:
        BuildError: no GPU that ONNX Runtime serves, or not enough memory on it.
    """
    _memory(provider)  # before anything is written
    shapes = {(matrix.K, matrix.N): matrix.is_table for matrix in model.multiplied}
    work = [(K, N, table, fmt, of) for (K, N), table in shapes.items() for fmt, of in _timed_as(formats, K).items()]
    reference, found, decoders = _smallest(model, formats), [], []
    for lora in (True, False):
        decoder = decoder_of(reference, lora)
        filled = sorted({min(context, decoder.capacity) for context in contexts})
        decoders += [Timed(decoder, context, lora) for context in filled]
    whole = WholeDecoders(decoders, max(tokens), clock)
    whole.time()
    for K, N, table, fmt, of in work:
        rows = (1,) if table else tuple(sorted(set(tokens)))
        timed = time_products(K, N, fmt, rows, provider=provider, clock=clock)
        found.append([replace(product, format=text) for text in of for product in timed])
        whole.time()
        progress(len(found), len(work), "products")
    settings = {"gpu": gpu or device, "activations": _FORM.activations}
    products = tuple(without_drift(found, whole.beside))
    timings = MeasuredLatency(device, f"onnxruntime {ort.__version__}, CUDA provider", settings, products, (), "cuda")
    return replace(timings, rests=tuple(whole.rests(timings, model, workload, reference)))
