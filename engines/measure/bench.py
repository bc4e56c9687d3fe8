"""Benchmark of a bundle on this machine: latency, tokens/s, LoRA on and off, emission, loading, share of bandwidth."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from coatrt.bundle import Bundle
from coatrt.configs.lora_contract import DecoderIO
from coatrt.devices.environment import environment
from coatrt.devices.profiles import DeviceProfile
from coatrt.engines.runtime.decoder import Decoder, LoraTensors
from coatrt.engines.runtime.device_decoder import DeviceDecoder
from coatrt.engines.runtime.emitter import Emitter
from coatrt.engines.runtime.load import load_decoder
from coatrt.engines.runtime.lora_file import load_lora
from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.errors import ConfigError
from coatrt.evaluation.presentation import median_interval, overhead_text
from coatrt.system.progress import Progress, silent
from coatrt.system.text_table import aligned

__all__ = ["bench", "bench_text", "overheads", "percentiles", "seconds_of"]


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return p50, p90 and p99 in ms and the number of samples."""
    p50, p90, p99 = (float(np.percentile(seconds, q)) * 1e3 for q in (50, 90, 99))
    return {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "samples": len(seconds)}


def seconds_of(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds that a call takes."""
    start = clock()
    call()
    return clock() - start


def bench(
    bundle: Bundle,
    options: RuntimeOptions = RuntimeOptions(),
    *,
    prompts: Sequence[int] = (16, 128),
    tokens: int = 32,
    repeat: int = 5,
    device: DeviceProfile | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure a bundle on this machine.

    Runs with and without LoRA alternate within every repetition, so that noise affects both equally. "Without" binds
    zeros to the same graph, as a service would. On a GPU the LoRA to switch to is in page-locked memory, as in a
    service that switches between several.

    Args:
        bundle: an opened bundle.
        options: how it runs; the context is replaced by the longest prompt plus `tokens`.
        prompts: prompt lengths in tokens; decoding continues after the longest.
        tokens: tokens decoded per repetition.
        repeat: repetitions.
        device: profile of this machine, for its share of the peak bandwidth; None omits that.
        progress: called as stages begin, and after each repetition.

    Raises:
        ConfigError: a number is below 1 or does not fit the decoder.
        BuildError: the backend cannot run here.
    """
    if not prompts or min(*prompts, tokens, repeat) < 1:
        values = f"{list(prompts)}, {tokens} and {repeat}"
        raise ConfigError(f"prompt lengths, tokens and repeat must be at least 1, got {values}")
    prompts = sorted(set(prompts))  # the longest last: decoding continues after it
    options = replace(options, context=prompts[-1] + tokens)
    lora = load_lora(bundle.path("lora.safetensors"), bundle.contract)
    progress(0, 1, "loading")
    decoder, load_seconds = _load(bundle, options)
    progress(0, 1, "hypernetwork")
    emission = _time_emission(bundle, options.threads, max(3, repeat))
    prefill, decode, switch = _sample(decoder, lora, options, prompts, repeat, progress)
    sizes = _bytes_per_token(bundle, decoder.io, options)
    rate = sizes["total"] / median(decode[True])
    return {
        "bundle": {
            "configuration": bundle.config.hash,
            "average_bits": bundle.manifest["configuration"]["average_bits"],
        },
        "backend": {**asdict(options), "activations": decoder.io.activations},
        "load_s": load_seconds,
        "emission": percentiles(emission),
        "prefill": [
            {"tokens": length, "lora": on, **_row(samples, options.batch * length)}
            for (length, on), samples in prefill.items()
        ],
        "decode": [
            {"lora": on, "context": options.context, **_row(samples, options.batch)} for on, samples in decode.items()
        ],
        "lora_switch": percentiles(switch),
        "lora_overhead": median(decode[True]) / median(decode[False]) - 1,
        "lora_overhead_interval": median_interval(overheads(decode, tokens)),
        "repetitions": repeat,
        "bytes_per_token": sizes,
        "environment": environment(),
        "bytes_per_s": rate,
        "bandwidth_share": rate / device.bandwidth if device is not None and device.bandwidth else None,
    }


def overheads(decode: Mapping[bool, Sequence[float]], tokens: int) -> list[float]:
    """Return the LoRA's share of a decode step's time in every repetition, from the medians of its `tokens` steps."""
    on, off = (np.median(np.reshape(decode[lora], (-1, tokens)), axis=1) for lora in (True, False))
    return [float(value) for value in on / off - 1]


def _load(bundle: Bundle, options: RuntimeOptions) -> tuple[Decoder, float]:
    """Return a decoder with the context of `options`, and the seconds it took to load."""
    start = time.perf_counter()
    decoder = load_decoder(bundle, options)
    seconds = time.perf_counter() - start
    if decoder.capacity < options.context:
        raise ConfigError(
            f"prompts and tokens need {options.context} positions, the decoder has {decoder.capacity}; use shorter "
            "prompts or fewer tokens, or build the bundle with a longer --context"
        )
    return decoder, seconds


def _time_emission(bundle: Bundle, threads: int | None, count: int) -> list[float]:
    """Return the seconds of each emission of the LoRA of the bundle's own configuration."""
    emitter, config = Emitter.of(bundle, threads), bundle.config
    return [seconds_of(lambda: emitter.emit(config)) for _ in range(count + 1)][1:]


def _row(seconds: Sequence[float], tokens: int) -> dict[str, float]:
    """Return percentiles of calls that process `tokens` tokens each, and tokens per second."""
    return {**percentiles(seconds), "tokens_per_s": tokens / median(seconds)}


def _sample(
    decoder: Decoder,
    lora: LoraTensors,
    options: RuntimeOptions,
    prompts: Sequence[int],
    repeat: int,
    progress: Progress,
) -> tuple[dict[tuple[int, bool], list[float]], dict[bool, list[float]], list[float]]:
    """Return seconds of prefill by (prompt length, LoRA on), of a decode step by LoRA on, and of binding the LoRA."""
    if isinstance(decoder, DeviceDecoder):
        lora = decoder.packed(lora)
    rng = np.random.default_rng(0)
    text = rng.integers(0, decoder.io.vocabulary, (options.batch, options.context)).tolist()
    prefill: dict[tuple[int, bool], list[float]] = {(length, on): [] for length in prompts for on in (True, False)}
    decode: dict[bool, list[float]] = {True: [], False: []}
    switch: list[float] = []
    for repetition in range(-1, repeat):  # the first round warms up
        for on in (True, False) if repetition % 2 else (False, True):
            bind_seconds = seconds_of(partial(decoder.set_lora, lora if on else None))
            if on:
                switch.append(bind_seconds)
            for length in prompts:
                prefill[length, on].append(seconds_of(partial(decoder.prefill, [row[:length] for row in text])))
            for step in range(prompts[-1], options.context):
                decode[on].append(seconds_of(partial(decoder.decode, [row[step] for row in text])))
        if repetition == -1:
            for samples in (*prefill.values(), *decode.values(), switch):
                samples.clear()
        else:
            progress(repetition + 1, repeat, "repetitions")
    return prefill, decode, switch


def _bytes_per_token(bundle: Bundle, io: DecoderIO, options: RuntimeOptions) -> dict[str, int]:
    """Return the bytes that one decode step reads, by purpose."""
    weights = int(bundle.manifest["configuration"]["bytes"]) + bundle.model_matrices.other_bytes
    element = np.dtype(io.activations).itemsize
    lora = element * sum(rows * columns for rows, columns in bundle.contract.inputs.values())
    slots = io.cache_length or options.context  # an engine reads unfilled slots too
    cache = 2 * io.layers * io.kv_heads * io.head_dim * slots * element * options.batch
    return {"weights": weights, "lora": lora, "kv_cache": cache, "total": weights + lora + cache}


def bench_text(result: dict[str, Any]) -> str:
    """Return a benchmark as an aligned table; a percentile that its samples do not reach is left out."""
    backend, size = result["backend"], result["bytes_per_token"]
    timed = [(f"prefill {row['tokens']}, LoRA {'on' if row['lora'] else 'off'}", row) for row in result["prefill"]]
    timed += [(f"decode, LoRA {'on' if row['lora'] else 'off'}", row) for row in result["decode"]]
    timed += [("hypernetwork", result["emission"]), ("LoRA switch", result["lora_switch"])]
    rows = [("", "p50 ms", "p90 ms", "p99 ms", "tokens/s")]
    for name, row in timed:
        p50, p90, p99 = (
            f"{row[key]:.2f}" if row["samples"] >= least else ""
            for key, least in (("p50_ms", 1), ("p90_ms", 10), ("p99_ms", 100))
        )
        rows.append((name, p50, p90, p99, f"{row['tokens_per_s']:.1f}" if "tokens_per_s" in row else ""))
    overhead = overhead_text(result["lora_overhead"], result["lora_overhead_interval"], result["repetitions"])
    share = result["bandwidth_share"]
    bound = f"{100 * share:.1f} % of the device's bandwidth" if share is not None else "bandwidth here unknown"
    lines = [
        f"configuration {result['bundle']['configuration']}, {result['bundle']['average_bits']:.3f} bits per weight; "
        f"{backend['backend']} {backend['activations']}, batch {backend['batch']}"
        + (f", accuracy level {backend['accuracy_level']}" if backend["backend"] == "ort" else ""),
        aligned(rows, "<>>>>"),
        f"LoRA overhead at decode: {overhead}; load {result['load_s']:.2f} s",
        f"bytes per token {size['total'] / 1e6:.1f} MB (weights {size['weights'] / 1e6:.1f}, "
        f"LoRA {size['lora'] / 1e6:.1f}, "
        f"KV cache {size['kv_cache'] / 1e6:.1f}): {result['bytes_per_s'] / 1e9:.2f} GB/s, {bound}",
    ]
    return "\n".join(lines)
