"""Timings of TensorRT engines on this machine's GPU: one whole engine in each format, and one mixed as a check.

TensorRT fuses and picks kernels for a whole graph, so that a product alone in an engine would be another product. What
a format costs is therefore taken from an engine with every matrix in it, and divided among the matrices by their
weights. Of a mixed configuration that predicts the mean of the formats' steps, each weighted by its share of weights.
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
from coatrt.engines.measure.bench import timed
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

__all__ = ["EngineSteps", "MakeBundle", "divided", "mixed_configuration", "time_trt"]

MakeBundle = Callable[[QuantConfig, Path], Bundle]
"""(configuration, directory) → a bundle there with an engine for this machine."""

EngineSteps = Mapping[int, float]
"""Slots filled → seconds of a decoded token; the key −n for a prompt of n tokens."""

_MOST_FORMATS = 16  # an engine takes minutes to build
_STEPS = 16


def mixed_configuration(adapter: AdapterDescription, formats: Sequence[WeightFormat]) -> QuantConfig:
    """Return a configuration with the formats in turn over the fused groups."""
    space = adapter.space.restrict(list(formats))
    return space.config([number % len(formats) for number in range(len(space.groups))])


def _steps(decoder: Decoder, contexts: Sequence[int], prompt: int, clock: Clock) -> EngineSteps:
    """Return what an engine's decoded token takes at each number of slots, and its prompt."""
    found: dict[int, float] = {}
    for context in contexts:
        filled = max(context - _STEPS - 2, 1)
        decoder.prefill([[1 + i % 100 for i in range(filled)]])
        samples = [timed(partial(decoder.decode, [5 + step]), clock) for step in range(min(_STEPS + 2, context - 1))]
        found[context] = statistics.median(samples[2:] or samples)
    prefill = partial(decoder.prefill, [[1 + i % 100 for i in range(prompt)]])
    found[-prompt] = statistics.median([timed(prefill, clock) for _ in range(4)][1:])
    return found


def divided(
    steps: Mapping[WeightFormat, EngineSteps], adapter: AdapterDescription, device: DeviceProfile, prompt: int
) -> tuple[tuple[Product, ...], tuple[Rest, ...]]:
    """Return the steps of whole engines as products and all else.

    Products get what a step takes beyond all else, by their weights. All else, with the fewest slots, is the most that
    leaves each format the time in which the peak bandwidth reads its weights; what a configuration is predicted to take
    does not depend on it. With more slots it is longer by what the steps are.

    Args:
        steps: format → steps of the engine with every matrix in it.
        adapter: gives the model.
        device: has the peak bandwidth.
        prompt: tokens of the prompt that was timed.
    """
    model = adapter.model
    contexts = sorted(slots for slots in next(iter(steps.values())) if slots > 0)
    least, shapes = contexts[0], {(matrix.K, matrix.N): matrix.is_table for matrix in model.multiplied}
    everywhere = sum(matrix.N * matrix.K for matrix in model.multiplied)
    layers = sum(matrix.N * matrix.K for matrix in model.targets)

    def read(fmt: WeightFormat) -> float:
        nbytes = sum(fmt.nbytes(matrix.N, matrix.K) for matrix in model.multiplied)
        return nbytes / device.bandwidth if device.bandwidth else 0.0

    rest = max(0.0, min(found[least] - read(fmt) for fmt, found in steps.items()))
    products: dict[tuple[int, int, str, int], Product] = {}
    for fmt, found in steps.items():
        for (K, N), table in shapes.items():
            text, share = str(fmt.effective(K)), N * K
            one = max(found[least] - rest, 0.0) * share / everywhere
            products[K, N, text, 1] = Product(K, N, text, 1, one)
            if not table:
                head = max(found[least] - rest, 0.0) * (everywhere - layers) / everywhere
                many = max(found[-prompt] - rest - head, 0.0) * share / layers
                products[K, N, text, prompt] = Product(K, N, text, prompt, many)
    rests = []
    for context in contexts:
        work = Workload.of(adapter, context, 1, prompt)
        more = statistics.median(found[context] - found[least] for found in steps.values())
        rests.append(Rest(shape_of(work), 1, context, rest + more))
    return tuple(products.values()), (*rests, Rest(rests[0].shape, prompt, least, rest))


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
    """Return the timings of engines that are built and run here, one for each format that the device has.

    Args:
        adapter: gives the model, its formats and the LoRA.
        device: profile of this machine's GPU.
        make: makes the bundles.
        gpu: the GPU's name as the driver has it.
        contexts: slots filled when a token is decoded.
        prompt: tokens of a prompt.
        clock: seconds.
        progress: called after each engine.

    Raises:
        BuildError: TensorRT is not installed, there is no GPU, or an engine is not built or does not load.
        ConfigError: the space has more formats than engines are built for.
    """
    version = installed_builder(device.builder)
    formats = [fmt for fmt in adapter.formats if device.supports(fmt)]
    if not 1 <= len(formats) <= _MOST_FORMATS:
        raise ConfigError(
            f"{len(formats)} of the adapter's formats run on {device.id}; an engine is built and timed for each: give "
            f"an adapter with 1 to {_MOST_FORMATS}"
        )
    configs = {fmt: QuantConfig.uniform(adapter.model, fmt) for fmt in formats}
    mixed = mixed_configuration(adapter, formats)
    total, steps = len(formats) + 1, {}
    checked: EngineSteps = {}
    with timings_scratch() as place:
        for number, (fmt, config) in enumerate([*configs.items(), (None, mixed)], 1):
            bundle = make(config, place / f"engine {number}")
            decoder = load_decoder(bundle, RuntimeOptions(backend="trt"))
            decoder.set_lora(load_lora(bundle.path("lora.safetensors"), bundle.contract))
            slots = sorted({min(context, decoder.capacity) for context in contexts})
            checked = _steps(decoder, slots, min(prompt, slots[-1]), clock)
            if fmt is not None:
                steps[fmt] = checked
            del decoder
            shutil.rmtree(place / f"engine {number}", ignore_errors=True)  # the files of a large model add up
            progress(number, total, "engines")
    prompt = -min(checked)
    products, rests = divided(steps, adapter, device, prompt)
    settings = {"gpu": gpu or device.id, "activations": "float16", "prompt": prompt}
    made = MeasuredLatency(device.id, f"{device.builder} {version}", settings, products, rests, "trt")
    context = max(checked)
    work = Workload.of(adapter, context, 1, prompt)
    predicted = products_seconds(made, adapter.model, mixed, 1, 1)
    predicted += made.rest_seconds(adapter.model, work, 1, context)
    settings["error of a mixed engine"] = f"{predicted / checked[context] - 1:+.1%}"
    return made
