"""Whole decoders timed between products: the time of a call beyond its products, and the machine's drift."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from coatrt.configs.config import QuantConfig
from coatrt.engines.measure.bench import seconds_of
from coatrt.engines.runtime.state import StatefulDecoder
from coatrt.models.matrices import ModelMatrices
from coatrt.planning.latency import products_seconds
from coatrt.planning.measured_latency import MeasuredLatency, Product, Rest, shape_of
from coatrt.planning.memory import Workload
from coatrt.system.disk import writing
from coatrt.system.scratch import scratch

__all__ = ["Clock", "TimedDecoder", "WholeDecoders", "decode_seconds", "timings_scratch", "without_drift"]

Clock = Callable[[], float]

_STEPS = 8  # decode steps per sample


@contextmanager
def timings_scratch() -> Iterator[Path]:
    """Yield a temporary directory for graphs, removed at the end."""
    folder = Path(tempfile.gettempdir())
    with writing(folder), scratch(folder, "timings") as directory:
        yield directory


def decode_seconds(decoder: StatefulDecoder, clock: Clock = time.perf_counter, context: int | None = None) -> float:
    """Return the median seconds of a decode step.

    Args:
        decoder: the decoder.
        clock: returns seconds.
        context: KV cache slots filled at the end of the measurement; None for all.
    """
    io, filled = decoder.io, max((context or decoder.capacity) - _STEPS - 2, 0)
    cache = np.zeros((decoder.batch, io.kv_heads, filled, io.head_dim), io.activations)
    decoder.restore((np.full(decoder.batch, filled, np.int64), [cache] * (2 * io.layers)))
    steps = range(5, 5 + _STEPS + 2)
    samples = [seconds_of(partial(decoder.decode, [token] * decoder.batch), clock) for token in steps]
    return statistics.median(samples[2:])


def _prefill_seconds(decoder: StatefulDecoder, tokens: int, clock: Clock) -> float:
    prefill = partial(decoder.prefill, [[1 + i % 100 for i in range(tokens)]])
    samples = [seconds_of(prefill, clock) for _ in range(4)]
    return statistics.median(samples[1:])


@dataclass(frozen=True)
class TimedDecoder:
    """A decoder to time.

    Args:
        decoder: the decoder.
        context: KV cache slots to fill; its timings are recorded under this number.
        lora: whether its graph has the adapter's LoRA.
    """

    decoder: StatefulDecoder
    context: int
    lora: bool = True


class WholeDecoders:
    """Decoders timed repeatedly between products.

    Args:
        decoders: the decoders; decode steps of the first one measure the machine's drift.
        prompt: tokens of a prompt; 1 times no prefill.
        clock: returns seconds.
    """

    def __init__(self, decoders: Sequence[TimedDecoder], prompt: int, clock: Clock) -> None:
        self._decoders, self._prompt, self._clock = decoders, prompt, clock
        self._seconds: dict[tuple[int, int, bool], list[float]] = {}

    def time(self) -> None:
        """Time a decode step of every decoder, and a prefill if the prompt has more than one token."""
        for subject in self._decoders:
            seconds = decode_seconds(subject.decoder, self._clock, subject.context)
            self._seconds.setdefault((1, subject.context, subject.lora), []).append(seconds)
            if self._prompt > 1:
                count = min(self._prompt, subject.decoder.capacity)
                seconds = _prefill_seconds(subject.decoder, count, self._clock)
                self._seconds.setdefault((count, subject.context, subject.lora), []).append(seconds)

    @property
    def reference_seconds(self) -> list[float]:
        """Seconds of a decode step of the first decoder, in order of time."""
        first = self._decoders[0]
        return self._seconds[1, first.context, first.lora]

    def rests(
        self, timings: MeasuredLatency, model: ModelMatrices, workload: Workload, reference: QuantConfig
    ) -> Iterator[Rest]:
        """Yield the time of each kind of call beyond its products.

        Args:
            timings: timings of the products.
            model: the decoders' matrices.
            workload: workload of the decoders with a LoRA.
            reference: configuration of the decoders.
        """
        for (count, context, lora), samples in self._seconds.items():
            shape = shape_of(workload if lora else replace(workload, lora_parameters=0))
            products = products_seconds(timings, model, reference, count, 1)
            yield Rest(shape, count, context, statistics.median(samples) - products)


def without_drift(batches: list[list[Product]], reference: list[float]) -> list[Product]:
    """Return products corrected to the machine's median speed.

    Args:
        batches: products in order of time.
        reference: seconds of the same decode step before the first batch, between batches and after the last.
    """
    middle = statistics.median(reference)
    return [
        replace(product, seconds=product.seconds * 2 * middle / (before + after))
        for batch, before, after in zip(batches, reference, reference[1:], strict=False)
        for product in batch
    ]
