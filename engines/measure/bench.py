"""Benchmark of a bundle on this machine: latencies, tokens/s, LoRA on and off, emission, load, the bandwidth bound."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from coatrt.bundle import Bundle
from coatrt.devices.environment import environment
from coatrt.devices.profiles import DeviceProfile
from coatrt.engines.runtime.emitter import Emitter, load_lora
from coatrt.engines.runtime.ort import OrtDecoder
from coatrt.errors import ConfigError
from coatrt.system.progress import Progress, silent

__all__ = ["bench", "bench_text", "percentiles"]


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return p50, p90 and p99 in ms and the number of samples."""
    p50, p90, p99 = (float(np.percentile(seconds, q)) * 1e3 for q in (50, 90, 99))
    return {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "samples": len(seconds)}


def _time(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def bench(
    bundle: Bundle,
    *,
    prompts: Sequence[int] = (16, 128),
    tokens: int = 32,
    repeat: int = 5,
    batch: int = 1,
    threads: int | None = None,
    accuracy_level: int = 4,
    device: DeviceProfile | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure a bundle with ONNX Runtime on the CPU.

    With and without LoRA alternate within every repetition, so that a noisy machine hits both alike. "Without" binds
    zero tensors: the graph is the same one, which is what a service runs.

    Args:
        bundle: an opened bundle.
        prompts: prompt lengths in tokens; decoding goes on behind the longest.
        tokens: tokens decoded per repetition.
        repeat: repetitions.
        batch: sequences at once.
        threads: of the session.
        accuracy_level: see `coatrt.engines.runtime.ort.session`.
        device: profile of the machine, for the bandwidth bound; None leaves it out.
        progress: see `coatrt.system.progress`.

    Raises:
        ConfigError: a number is not positive or does not fit the decoder.
    """
    if min(*prompts, tokens, repeat, batch) < 1:
        raise ConfigError("prompt lengths, tokens, repeat and batch are counts; give at least 1 each")
    prompts = sorted(set(prompts))  # the longest comes last, and decoding goes on behind it
    contract = bundle.contract
    graph, io = bundle.decoder("cpu")
    lora = load_lora(bundle.path("lora.safetensors"), contract)
    context = max(prompts) + tokens
    started = time.perf_counter()
    decoder = OrtDecoder(
        graph, io, contract, batch=batch, context=context, threads=threads, accuracy_level=accuracy_level
    )
    load_seconds = time.perf_counter() - started
    emitter, config = Emitter.of(bundle, threads), bundle.config
    emission = [_time(lambda: emitter.emit(config)) for _ in range(max(3, repeat) + 1)][1:]
    rng = np.random.default_rng(0)
    text = rng.integers(0, io.vocabulary, (batch, context)).tolist()
    prefill: dict[tuple[int, bool], list[float]] = {(length, on): [] for length in prompts for on in (True, False)}
    decode: dict[bool, list[float]] = {True: [], False: []}
    for repetition in range(-1, repeat):  # the first round warms up
        for on in (True, False) if repetition % 2 else (False, True):
            decoder.set_lora(lora if on else None)
            for length in prompts:
                now = [row[:length] for row in text]
                prefill[length, on].append(_time(lambda now=now: decoder.prefill(now)))  # type: ignore[misc]
            for step in range(tokens):
                now_tokens = [row[max(prompts) + step] for row in text]
                decode[on].append(_time(lambda now=now_tokens: decoder.decode(now)))  # type: ignore[misc]
        if repetition == -1:
            for samples in (*prefill.values(), *decode.values()):
                samples.clear()
        else:
            progress(repetition + 1, repeat, "repetitions")
    weights = int(bundle.manifest["configuration"]["bytes"]) + bundle.model_matrices.other_bytes
    activation = np.dtype(io.activations).itemsize
    lora_bytes = activation * sum(rows * columns for rows, columns in contract.shapes.values())
    kv_bytes = 2 * io.layers * io.kv_heads * io.head_dim * context * activation * batch
    per_token = weights + lora_bytes + kv_bytes
    result: dict[str, Any] = {
        "bundle": {"configuration": config.hash, "average_bits": bundle.manifest["configuration"]["average_bits"]},
        "backend": {
            "name": "onnxruntime",
            "form": "cpu",
            "activations": io.activations,
            "threads": threads,
            "accuracy_level": accuracy_level,
            "batch": batch,
        },
        "load_s": load_seconds,
        "emission": percentiles(emission),
        "prefill": [
            {
                "tokens": length,
                "lora": on,
                **percentiles(samples),
                "tokens_per_s": batch * length / float(np.median(samples)),
            }
            for (length, on), samples in prefill.items()
        ],
        "decode": [
            {"lora": on, "context": context, **percentiles(samples), "tokens_per_s": batch / float(np.median(samples))}
            for on, samples in decode.items()
        ],
        "lora_overhead": float(np.median(decode[True]) / np.median(decode[False])) - 1,
        "bytes_per_token": {"weights": weights, "lora": lora_bytes, "kv_cache": kv_bytes, "total": per_token},
        "environment": environment(),
    }
    rate = per_token / float(np.median(decode[True]))
    result["bytes_per_s"] = rate
    result["bandwidth_share"] = rate / device.bandwidth if device is not None and device.bandwidth else None
    return result


def bench_text(result: dict[str, Any]) -> str:
    """Return a benchmark as an aligned table."""
    backend, size = result["backend"], result["bytes_per_token"]
    lines = [
        f"configuration {result['bundle']['configuration']}, {result['bundle']['average_bits']:.3f} bits per weight; "
        f"{backend['name']} {backend['activations']}, batch {backend['batch']}, "
        f"accuracy level {backend['accuracy_level']}",
        f"{'':<24}{'p50 ms':>10}{'p90 ms':>10}{'p99 ms':>10}{'tokens/s':>12}",
    ]
    rows = [(f"prefill {row['tokens']}, LoRA {'on' if row['lora'] else 'off'}", row) for row in result["prefill"]]
    rows += [(f"decode, LoRA {'on' if row['lora'] else 'off'}", row) for row in result["decode"]]
    rows.append(("hypernetwork", result["emission"]))
    for name, row in rows:
        speed = f"{row['tokens_per_s']:12.1f}" if "tokens_per_s" in row else ""
        lines.append(f"{name:<24}{row['p50_ms']:10.2f}{row['p90_ms']:10.2f}{row['p99_ms']:10.2f}{speed}")
    share = result["bandwidth_share"]
    bound = f"{100 * share:.1f} % of the device's bandwidth" if share is not None else "bandwidth here unknown"
    lines += [
        f"LoRA overhead at decode {100 * result['lora_overhead']:+.1f} %; load {result['load_s']:.2f} s",
        f"bytes per token {size['total'] / 1e6:.1f} MB (weights {size['weights'] / 1e6:.1f}, "
        f"LoRA {size['lora'] / 1e6:.1f}, "
        f"KV cache {size['kv_cache'] / 1e6:.1f}): {result['bytes_per_s'] / 1e9:.2f} GB/s, {bound}",
    ]
    return "\n".join(lines)
