"""Predicted against measured decode in ONNX Runtime: ten configurations that were not timed before.

python benchmarks/cpu_timings.py   (needs out/demo/adapter: make demo)

One thread, in seconds of its CPU time, which other processes do not disturb. The machine's speed still drifts, so
a reference decoder is timed beside each configuration, and the prediction is also scaled by its current speed.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import save_result, smollm2

from coatrt.adapter.adapter import Adapter
from coatrt.configs.config import QuantConfig
from coatrt.engines.measure.cpu_timings import adapted_decoder, time_cpu
from coatrt.engines.measure.whole_decoders import decode_seconds
from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.engines.runtime.ort import OrtDecoder
from coatrt.planning.latency import products_seconds
from coatrt.planning.measured_latency import MeasuredLatency
from coatrt.planning.memory import Workload

CONTEXT, LEVEL, ROUNDS = 256, 4, 5


OPTIONS = RuntimeOptions(context=CONTEXT, threads=1, accuracy_level=LEVEL)


def predicted_decode(timings: MeasuredLatency, adapter: Adapter, config: QuantConfig) -> float:
    """Return the predicted seconds of decoding a token with a configuration."""
    work, model = Workload.of(adapter.description, CONTEXT, 1, 1, 4), adapter.description.model
    return timings.rest_seconds(model, work, 1, CONTEXT) + products_seconds(timings, model, config, 1, 1)


def compare(
    adapter: Adapter, predict: Callable[[QuantConfig], float], decode: Callable[[QuantConfig], OrtDecoder], count: int
) -> Iterator[dict[str, Any]]:
    """Yield measured and predicted times of each configuration, a reference decoder timed beside it."""
    rng = np.random.default_rng(3)
    same = QuantConfig.uniform(adapter.description.model, adapter.description.formats[0])  # the reference
    reference, then = decode(same), predict(same)
    for number in range(count):
        bits = 3.7 + (7.6 - 3.7) * number / max(count - 1, 1)
        config = adapter.description.space.sample(rng, bits)
        first_run, real, now = decode(config), [], []
        for _ in range(ROUNDS):
            now.append(decode_seconds(reference, time.thread_time))
            real.append(decode_seconds(first_run, time.thread_time))
        del first_run
        predicted = predict(config)
        median = statistics.median(real)
        drift = median / statistics.median(one / beside for one, beside in zip(real, now, strict=True)) / then
        yield {
            "bits": config.average_bits(adapter.description.model),
            "formats": dict(config.counts),
            "real_ms": median * 1e3,
            "predicted_ms": predicted * 1e3,
            "error": predicted / median - 1,
            "drift": drift,
            "error_without_drift": predicted * drift / median - 1,
        }


def main() -> None:
    """Time the products, then alternate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", type=Path, default=Path("out/demo/adapter"))
    parser.add_argument("--count", type=int, default=10)
    options = parser.parse_args()
    adapter, checkpoint = Adapter.from_pretrained(options.adapter), smollm2()
    start = time.monotonic()
    timings = time_cpu(
        adapter,
        checkpoint,
        OPTIONS,
        tokens=(1,),
        contexts=(CONTEXT,),
        clock=time.thread_time,
        progress=lambda done, total, *_: print(f"{done}/{total}", flush=True),
    )
    seconds, rows = time.monotonic() - start, []
    predict = partial(predicted_decode, timings, adapter)

    def decode(config: QuantConfig) -> OrtDecoder:
        place = Path(scratch) / config.hash
        place.mkdir(exist_ok=True)
        return adapted_decoder(adapter, checkpoint, config, place, OPTIONS)

    with tempfile.TemporaryDirectory() as scratch:
        for row in compare(adapter, predict, decode, options.count):
            rows.append(row)
            print(row, flush=True)
    result = {
        "context": CONTEXT,
        "accuracy_level": LEVEL,
        "threads": 1,
        "timing_s": seconds,
        "products": [[p.K, p.N, p.format, p.tokens, p.seconds] for p in timings.products],
        "rest_ms": [rest.seconds * 1e3 for rest in timings.rests],
        "rows": rows,
        "worst_error": max(abs(row["error"]) for row in rows),
        "worst_error_without_drift": max(abs(row["error_without_drift"]) for row in rows),
    }
    save_result("cpu_timings", "python benchmarks/cpu_timings.py", result)
    if result["worst_error_without_drift"] > 0.15:
        sys.exit(f"over the limit: {result['worst_error_without_drift']:.3f}")


if __name__ == "__main__":
    main()
