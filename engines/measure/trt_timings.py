"""Timings of TensorRT engines on this machine's GPU: one whole engine per format, and a mixed one as a check.

TensorRT fuses and picks kernels for a whole graph, so a product alone in an engine would run differently. The time of a
format is therefore measured with an engine that has every matrix in that format, and divided among the matrices by
their number of weights. For a mixed configuration this predicts the mean of the formats' steps, weighted by their
shares of the weights.
"""

import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from coatrt.adapter.description import AdapterDescription
from coatrt.bundle import Bundle
from coatrt.configs.config import QuantConfig
from coatrt.devices.profiles import DeviceProfile
from coatrt.engines.builders.builder import installed_builder
from coatrt.engines.measure.bench import seconds_of
from coatrt.engines.measure.whole_decoders import Clock, timings_scratch
from coatrt.engines.runtime.decoder import Decoder
from coatrt.engines.runtime.load import load_decoder
from coatrt.engines.runtime.lora_file import load_lora
from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.errors import ConfigError
from coatrt.planning.latency import products_seconds
from coatrt.planning.measured_latency import MeasuredLatency, Product, Rest, shape_of
from coatrt.planning.memory import Workload
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.progress import Progress, silent

__all__ = ["EngineSteps", "MakeBundle", "mixed_configuration", "products_and_rests", "time_trt"]

MakeBundle = Callable[[QuantConfig, Path], Bundle]
"""(configuration, directory) → a bundle in that directory with an engine for this machine."""

EngineSteps = Mapping[int, float]
"""KV cache slots filled → seconds of a decode step; the key −n is for a prompt of n tokens."""

_MAX_FORMATS = 16  # an engine takes minutes to build
_STEPS = 16


def mixed_configuration(adapter: AdapterDescription, formats: Sequence[WeightFormat]) -> QuantConfig:
    """Return a configuration that assigns the formats to the fused groups in turn."""
    space = adapter.space.restrict(list(formats))
    return space.config([number % len(formats) for number in range(len(space.groups))])


def _steps(decoder: Decoder, contexts: Sequence[int], prompt: int, clock: Clock) -> EngineSteps:
    """Return the seconds of an engine's decode step for each number of filled slots, and of a prompt."""
    seconds: dict[int, float] = {}
    for context in contexts:
        filled = max(context - _STEPS - 2, 1)
        decoder.prefill([[1 + i % 100 for i in range(filled)]])
        steps = range(min(_STEPS + 2, context - 1))
        samples = [seconds_of(partial(decoder.decode, [5 + step]), clock) for step in steps]
        seconds[context] = statistics.median(samples[2:] or samples)
    prefill = partial(decoder.prefill, [[1 + i % 100 for i in range(prompt)]])
    seconds[-prompt] = statistics.median([seconds_of(prefill, clock) for _ in range(4)][1:])
    return seconds


def products_and_rests(
    steps: Mapping[WeightFormat, EngineSteps], adapter: AdapterDescription, device: DeviceProfile, prompt: int
) -> tuple[tuple[Product, ...], tuple[Rest, ...]]:
    """Split the steps of whole engines into products and the rest of a step.

    The rest at the smallest context is the largest time that still leaves every format as long as the peak bandwidth
    needs to read its weights; predictions for whole configurations do not depend on this choice. At larger contexts the
    rest grows by as much as the steps. The time of a step minus the rest is divided among the products by their number
    of weights.

    Args:
        steps: format → steps of the engine with every matrix in that format.
        adapter: gives the model.
        device: gives the peak bandwidth.
        prompt: tokens of the prompt that was timed.
    """
    model = adapter.model
    contexts = sorted(slots for slots in next(iter(steps.values())) if slots > 0)
    shortest, shapes = contexts[0], {(matrix.K, matrix.N): matrix.is_table for matrix in model.multiplied}
    all_weights = sum(matrix.N * matrix.K for matrix in model.multiplied)
    layer_weights = sum(matrix.N * matrix.K for matrix in model.targets)

    def read_seconds(fmt: WeightFormat) -> float:
        nbytes = sum(fmt.nbytes(matrix.N, matrix.K) for matrix in model.multiplied)
        return nbytes / device.bandwidth if device.bandwidth else 0.0

    rest = max(0.0, min(seconds[shortest] - read_seconds(fmt) for fmt, seconds in steps.items()))
    products: dict[tuple[int, int, str, int], Product] = {}
    for fmt, seconds in steps.items():
        for (K, N), table in shapes.items():
            text, weights = str(fmt.effective(K)), N * K
            decode = max(seconds[shortest] - rest, 0.0) * weights / all_weights
            products[K, N, text, 1] = Product(K, N, text, 1, decode)
            if not table:
                head = max(seconds[shortest] - rest, 0.0) * (all_weights - layer_weights) / all_weights
                prefill = max(seconds[-prompt] - rest - head, 0.0) * weights / layer_weights
                products[K, N, text, prompt] = Product(K, N, text, prompt, prefill)
    rests = []
    for context in contexts:
        workload = Workload.of(adapter, context, 1, prompt)
        growth = statistics.median(seconds[context] - seconds[shortest] for seconds in steps.values())
        rests.append(Rest(shape_of(workload), 1, context, rest + growth))
    return tuple(products.values()), (*rests, Rest(rests[0].shape, prompt, shortest, rest))


def time_trt(
    adapter: AdapterDescription,
    device: DeviceProfile,
    make: MakeBundle,
    *,
    gpu: str = "",
    contexts: Sequence[int] = (128, 2048),
    prompt: int = 128,
    clock: Clock = time.perf_counter,
    progress: Progress = silent,
) -> MeasuredLatency:
    """Build and run engines on this machine and return their timings: one engine per format that the device supports.

    Args:
        adapter: gives the model, its formats and the LoRA.
        device: profile of this machine's GPU.
        make: builds a bundle of a configuration.
        gpu: the GPU's name from the driver.
        contexts: KV cache slots filled at a decode step.
        prompt: tokens of a prompt.
        clock: returns seconds.
        progress: called after each engine.

    Raises:
        BuildError: TensorRT is not installed, there is no GPU, or an engine cannot be built or loaded.
        ConfigError: the device supports none of the adapter's formats, or more than 16.
    """
    version = installed_builder(device.builder)
    formats = [fmt for fmt in adapter.formats if device.supports(fmt)]
    if not 1 <= len(formats) <= _MAX_FORMATS:
        raise ConfigError(
            f"{len(formats)} of the adapter's formats run on {device.id}, and each needs an engine; give an adapter "
            f"with 1 to {_MAX_FORMATS} such formats"
        )
    configs = {fmt: QuantConfig.uniform(adapter.model, fmt) for fmt in formats}
    mixed = mixed_configuration(adapter, formats)
    total, steps = len(formats) + 1, {}
    last: EngineSteps = {}
    with timings_scratch() as directory:
        for number, (fmt, config) in enumerate([*configs.items(), (None, mixed)], 1):
            bundle = make(config, directory / f"engine {number}")
            decoder = load_decoder(bundle, RuntimeOptions(backend="trt"))
            decoder.set_lora(load_lora(bundle.path("lora.safetensors"), bundle.contract))
            slots = sorted({min(context, decoder.capacity) for context in contexts})
            last = _steps(decoder, slots, min(prompt, slots[-1]), clock)
            if fmt is not None:
                steps[fmt] = last
            del decoder
            shutil.rmtree(directory / f"engine {number}", ignore_errors=True)  # the bundles of a large model add up
            progress(number, total, "engines")
    prompt = -min(last)  # shorter than given if the engine's caches are
    products, rests = products_and_rests(steps, adapter, device, prompt)
    settings = {"gpu": gpu or device.id, "activations": "float16", "prompt": prompt}
    timings = MeasuredLatency(device.id, f"{device.builder} {version}", settings, products, rests, "trt")
    context = max(last)
    workload = Workload.of(adapter, context, 1, prompt)
    prediction = products_seconds(timings, adapter.model, mixed, 1, 1)
    prediction += timings.rest_seconds(adapter.model, workload, 1, context)
    settings["error of a mixed engine"] = f"{prediction / last[context] - 1:+.1%}"  # `last` is the mixed engine's
    return timings
