"""Benchmark of a bundle on this machine: latencies, tokens/s, LoRA on and off, emission, load, the bandwidth bound."""

import time
from collections.abc import Callable, Sequence
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
from coatrt.system.progress import Progress, silent
from coatrt.system.text_table import aligned

__all__ = ["bench", "bench_text", "percentiles", "timed"]


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return p50, p90 and p99 in ms and the number of samples."""
    p50, p90, p99 = (float(np.percentile(seconds, q)) * 1e3 for q in (50, 90, 99))
    return {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "samples": len(seconds)}


def timed(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds that a call takes by a clock."""
    started = clock()
    call()
    return clock() - started


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

    With and without LoRA alternate within every repetition, so that a noisy machine hits both alike. "Without" binds
    zero tensors: the graph is the same one, which is what a service runs. On a GPU the LoRA that is switched to lies in
    page-locked memory, as a service would keep those that it changes between.

    Args:
        bundle: an opened bundle.
        options: how it runs; the context is what the longest prompt and the tokens need.
        prompts: prompt lengths in tokens; decoding goes on behind the longest.
        tokens: tokens decoded per repetition.
        repeat: repetitions.
        device: profile of the machine, for the bandwidth bound; None leaves it out.
        progress: called as stages begin, and after each repetition.

    Raises:
        ConfigError: a number is not positive or does not fit the decoder.
        BuildError: the backend cannot run here.
    """
    if not prompts or min(*prompts, tokens, repeat) < 1:
        given = f"{list(prompts)}, {tokens} and {repeat}"
        raise ConfigError(f"prompt lengths, tokens and repeat must be at least 1, got {given}")
    prompts = sorted(set(prompts))  # the longest comes last, and decoding goes on behind it
    options = replace(options, context=prompts[-1] + tokens)
    lora = load_lora(bundle.path("lora.safetensors"), bundle.contract)
    progress(0, 1, "loading")
    decoder, load_seconds = _loaded(bundle, options)
    progress(0, 1, "hypernetwork")
    emission = _emission(bundle, options.threads, max(3, repeat))
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
        "bytes_per_token": sizes,
        "environment": environment(),
        "bytes_per_s": rate,
        "bandwidth_share": rate / device.bandwidth if device is not None and device.bandwidth else None,
    }


def _loaded(bundle: Bundle, options: RuntimeOptions) -> tuple[Decoder, float]:
    """Return a decoder that has the context, and the seconds of loading it."""
    started = time.perf_counter()
    decoder = load_decoder(bundle, options)
    seconds = time.perf_counter() - started
    if decoder.capacity < options.context:
        raise ConfigError(f"prompts and tokens need {options.context} positions, the decoder has {decoder.capacity}")
    return decoder, seconds


def _emission(bundle: Bundle, threads: int | None, count: int) -> list[float]:
    """Return the seconds of emitting the LoRA of the bundle's own configuration."""
    emitter, config = Emitter.of(bundle, threads), bundle.config
    return [timed(lambda: emitter.emit(config)) for _ in range(count + 1)][1:]


def _row(seconds: Sequence[float], tokens: int) -> dict[str, float]:
    """Return percentiles of calls that each take so many tokens, and tokens per second."""
    return {**percentiles(seconds), "tokens_per_s": tokens / median(seconds)}


def _sample(
    decoder: Decoder,
    lora: LoraTensors,
    options: RuntimeOptions,
    prompts: Sequence[int],
    repeat: int,
    progress: Progress,
) -> tuple[dict[tuple[int, bool], list[float]], dict[bool, list[float]], list[float]]:
    """Return seconds of prefill by (prompt length, LoRA on), of a decoded token by LoRA on, and of binding the LoRA."""
    if isinstance(decoder, DeviceDecoder):
        lora = decoder.packed(lora)
    rng = np.random.default_rng(0)
    text = rng.integers(0, decoder.io.vocabulary, (options.batch, options.context)).tolist()
    prefill: dict[tuple[int, bool], list[float]] = {(length, on): [] for length in prompts for on in (True, False)}
    decode: dict[bool, list[float]] = {True: [], False: []}
    switch: list[float] = []
    for repetition in range(-1, repeat):  # the first round warms up
        for on in (True, False) if repetition % 2 else (False, True):
            bound = timed(partial(decoder.set_lora, lora if on else None))
            if on:
                switch.append(bound)
            for length in prompts:
                prefill[length, on].append(timed(partial(decoder.prefill, [row[:length] for row in text])))
            for step in range(prompts[-1], options.context):
                decode[on].append(timed(partial(decoder.decode, [row[step] for row in text])))
        if repetition == -1:
            for samples in (*prefill.values(), *decode.values(), switch):
                samples.clear()
        else:
            progress(repetition + 1, repeat, "repetitions")
    return prefill, decode, switch


def _bytes_per_token(bundle: Bundle, io: DecoderIO, options: RuntimeOptions) -> dict[str, int]:
    """Return the bytes that decoding a token of each sequence reads, by purpose."""
    weights = int(bundle.manifest["configuration"]["bytes"]) + bundle.model_matrices.other_bytes
    element = np.dtype(io.activations).itemsize
    lora = element * sum(rows * columns for rows, columns in bundle.contract.inputs.values())
    slots = io.cache_length or options.context  # an engine reads the slots that are not filled, too
    cache = 2 * io.layers * io.kv_heads * io.head_dim * slots * element * options.batch
    return {"weights": weights, "lora": lora, "kv_cache": cache, "total": weights + lora + cache}


def bench_text(result: dict[str, Any]) -> str:
    """Return a benchmark as an aligned table."""
    backend, size = result["backend"], result["bytes_per_token"]
    timed = [(f"prefill {row['tokens']}, LoRA {'on' if row['lora'] else 'off'}", row) for row in result["prefill"]]
    timed += [(f"decode, LoRA {'on' if row['lora'] else 'off'}", row) for row in result["decode"]]
    timed += [("hypernetwork", result["emission"]), ("LoRA switch", result["lora_switch"])]
    rows = [("", "p50 ms", "p90 ms", "p99 ms", "tokens/s")]
    for name, row in timed:
        p50, p90, p99 = (f"{row[key]:.2f}" for key in ("p50_ms", "p90_ms", "p99_ms"))
        rows.append((name, p50, p90, p99, f"{row['tokens_per_s']:.1f}" if "tokens_per_s" in row else ""))
    share = result["bandwidth_share"]
    bound = f"{100 * share:.1f} % of the device's bandwidth" if share is not None else "bandwidth here unknown"
    lines = [
        f"configuration {result['bundle']['configuration']}, {result['bundle']['average_bits']:.3f} bits per weight; "
        f"{backend['backend']} {backend['activations']}, batch {backend['batch']}"
        + (f", accuracy level {backend['accuracy_level']}" if backend["backend"] == "ort" else ""),
        aligned(rows, "<>>>>"),
        f"LoRA overhead at decode {100 * result['lora_overhead']:+.1f} %; load {result['load_s']:.2f} s",
        f"bytes per token {size['total'] / 1e6:.1f} MB (weights {size['weights'] / 1e6:.1f}, "
        f"LoRA {size['lora'] / 1e6:.1f}, "
        f"KV cache {size['kv_cache'] / 1e6:.1f}): {result['bytes_per_s'] / 1e9:.2f} GB/s, {bound}",
    ]
    return "\n".join(lines)
