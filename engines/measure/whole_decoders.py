"""Whole decoders timed again and again beside products: what a call takes beyond them, and the machine's drift."""

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
from coatrt.engines.measure.bench import timed
from coatrt.engines.runtime.state import StatefulDecoder
from coatrt.models.matrices import ModelMatrices
from coatrt.planning.latency import products_seconds
from coatrt.planning.measured_latency import MeasuredLatency, Product, Rest, shape_of
from coatrt.planning.memory import Workload
from coatrt.system.disk import writing
from coatrt.system.scratch import scratch

__all__ = ["Clock", "Timed", "WholeDecoders", "decode_seconds", "timings_scratch", "without_drift"]

Clock = Callable[[], float]

_STEPS = 8  # tokens decoded to time one


@contextmanager
def timings_scratch() -> Iterator[Path]:
    """Give a directory for graphs, removed at the end."""
    folder = Path(tempfile.gettempdir())
    with writing(folder), scratch(folder, "timings") as place:
        yield place


def decode_seconds(decoder: StatefulDecoder, clock: Clock = time.perf_counter, context: int | None = None) -> float:
    """Return the median seconds of decoding one token per sequence.

    Args:
        decoder: decodes.
        clock: seconds.
        context: slots that are filled but for the tokens decoded here; None for all.
    """
    io, filled = decoder.io, max((context or decoder.capacity) - _STEPS - 2, 0)
    cache = np.zeros((decoder.batch, io.kv_heads, filled, io.head_dim), io.activations)
    decoder.restore((np.full(decoder.batch, filled, np.int64), [cache] * (2 * io.layers)))
    steps = range(5, 5 + _STEPS + 2)
    samples = [timed(partial(decoder.decode, [token] * decoder.batch), clock) for token in steps]
    return statistics.median(samples[2:])


def _prefill_seconds(decoder: StatefulDecoder, tokens: int, clock: Clock) -> float:
    prefill = partial(decoder.prefill, [[1 + i % 100 for i in range(tokens)]])
    samples = [timed(prefill, clock) for _ in range(4)]
    return statistics.median(samples[1:])


@dataclass(frozen=True)
class Timed:
    """A decoder to time.

    Args:
        decoder: it.
        context: slots filled, and what its timings are said to be of.
        lora: whether its graph has the adapter's LoRA.
    """

    decoder: StatefulDecoder
    context: int
    lora: bool = True


class WholeDecoders:
    """Decoders timed again and again beside the products.

    Args:
        decoders: the first one's decoded token tells the machine's drift.
        prompt: tokens of a prompt; 1 for none.
        clock: seconds.
    """

    def __init__(self, decoders: Sequence[Timed], prompt: int, clock: Clock) -> None:
        self._decoders, self._prompt, self._clock = decoders, prompt, clock
        self._seconds: dict[tuple[int, int, bool], list[float]] = {}

    def time(self) -> None:
        """Time a decoded token, and a prompt where prompts are asked for."""
        for one in self._decoders:
            seconds = decode_seconds(one.decoder, self._clock, one.context)
            self._seconds.setdefault((1, one.context, one.lora), []).append(seconds)
            if self._prompt > 1:
                count = min(self._prompt, one.decoder.capacity)
                seconds = _prefill_seconds(one.decoder, count, self._clock)
                self._seconds.setdefault((count, one.context, one.lora), []).append(seconds)

    @property
    def beside(self) -> list[float]:
        """Seconds of a decoded token of the first decoder, by time."""
        first = self._decoders[0]
        return self._seconds[1, first.context, first.lora]

    def rests(
        self, timings: MeasuredLatency, model: ModelMatrices, workload: Workload, reference: QuantConfig
    ) -> Iterator[Rest]:
        """Yield what each kind of call takes beyond its products.

        Args:
            timings: has the products.
            model: the decoders' matrices.
            workload: of the decoders with a LoRA.
            reference: configuration of the decoders.
        """
        for (count, context, lora), samples in self._seconds.items():
            shape = shape_of(workload if lora else replace(workload, lora_parameters=0))
            known = products_seconds(timings, model, reference, count, 1)
            yield Rest(shape, count, context, statistics.median(samples) - known)


def without_drift(timed: list[list[Product]], beside: list[float]) -> list[Product]:
    """Return the products as they would be at the machine's median speed.

    Args:
        timed: products in the order of time.
        beside: seconds of one and the same decoder before the first, between any two and after the last.
    """
    middle = statistics.median(beside)
    return [
        replace(product, seconds=product.seconds * 2 * middle / (before + after))
        for found, before, after in zip(timed, beside, beside[1:], strict=False)
        for product in found
    ]
