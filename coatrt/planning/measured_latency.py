"""Timings: products and all else of a decoder, measured on a device through its real runtime, and read back."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from coatrt.configs.space import ConfigSpace
from coatrt.devices.profiles import Builder, DeviceProfile
from coatrt.errors import ConfigError
from coatrt.models.matrices import ModelMatrices
from coatrt.planning.memory import Workload
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.disk import cache_directory, is_cached
from coatrt.system.json_data import read_as
from coatrt.system.ranges import Bytes, Count

__all__ = ["MeasuredLatency", "Product", "Rest", "TimedBackend", "find_timings", "shape_of", "timings_path"]

TimedBackend = Literal["ort", "cuda", "trt"]
"""The timed runtime, as --backend names it: ONNX Runtime on the CPU, on the GPU, or TensorRT engines."""

_RUNTIMES: dict[Builder, tuple[TimedBackend, ...]] = {
    "onnxruntime": ("ort",),
    "tensorrt-rtx": ("trt", "cuda"),
    "tensorrt": ("trt", "cuda"),
}
"""Builder of a device → whose timings its plans take, the first that cover the space."""

_WHOLE = "whole engines are measured, one per format; a matrix gets its share of the time by its weights"
_FORMAT = 3
_MOST_SECONDS = 1e6


@dataclass(frozen=True)
class Product:
    """One product [tokens, K] × [K, N] in a format.

    Args:
        K: input width.
        N: output width.
        format: text of the effective format.
        tokens: rows.
        seconds: median of its timings.
    """

    K: Count
    N: Count
    format: str
    tokens: Count
    seconds: float


@dataclass(frozen=True)
class Rest:
    """All of one call beside the products with weights: LoRA, attention, norms, the runtime itself.

    Args:
        shape: (layers, hidden, intermediate, heads, KV heads, head width, LoRA elements) of the model.
        tokens: tokens in the call.
        context: slots of the caches.
        seconds: the call's, less its products'.
    """

    shape: tuple[Bytes, ...]
    tokens: Count
    context: Count
    seconds: float


def shape_of(workload: Workload) -> tuple[int, ...]:
    """Return the numbers of a model that decide `Rest.seconds`, as `Rest.shape` holds them."""
    spec, width, lora = workload.spec, workload.intermediate, workload.lora_parameters
    return (spec.layers, spec.hidden, width, spec.heads, spec.kv_heads, spec.head_dim, lora)


@dataclass(frozen=True)
class MeasuredLatency:
    """Measured seconds of one device; a `coatrt.planning.latency.LatencyModel`.

    Args:
        device: id of the profile it belongs to.
        runtime: name and version.
        settings: of the measurement: threads, accuracy level, activations, name of the processor.
        products: timings of products.
        rests: timings of all else, at least one.
        backend: the runtime measured.
        format: of the file.

    Raises:
        ConfigError: an entry appears twice, a size is below 1, or a time is out of range.
    """

    device: str
    runtime: str
    settings: Mapping[str, Any]
    products: tuple[Product, ...]
    rests: tuple[Rest, ...]
    backend: TimedBackend = "ort"
    format: int = _FORMAT

    def __post_init__(self) -> None:
        keys: list[tuple[object, ...]] = [(p.K, p.N, p.format, p.tokens) for p in self.products]
        keys += [(rest.shape, rest.tokens, rest.context) for rest in self.rests]
        sizes = [size for p in self.products for size in (p.K, p.N, p.tokens)]
        sizes += [size for rest in self.rests for size in (rest.tokens, rest.context)]
        times = [p.seconds for p in self.products] + [abs(rest.seconds) for rest in self.rests]
        if len(set(keys)) < len(keys) or min(sizes, default=1) < 1:
            raise ConfigError(
                "timings hold an entry twice, or a size below 1; measure again (coatrt devices calibrate)"
            )
        if not all(0 <= seconds < _MOST_SECONDS for seconds in times):
            raise ConfigError(f"timings must be 0 to {_MOST_SECONDS:g} s; measure again (coatrt devices calibrate)")

    @cached_property
    def _points(self) -> dict[tuple[int, int, str], list[tuple[int, float]]]:
        """(tokens, seconds) by (N, K, format), by ascending tokens."""
        points: dict[tuple[int, int, str], list[tuple[int, float]]] = {}
        for product in sorted(self.products, key=lambda product: product.tokens):
            points.setdefault((product.N, product.K, product.format), []).append((product.tokens, product.seconds))
        return points

    @property
    def source(self) -> str:
        """The source of the prediction."""
        known = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        how = _WHOLE if self.backend == "trt" else "all measured there"
        return f"timings of {self.device} with {self.runtime} ({known}): {how}"

    def covers(self, space: ConfigSpace, workload: Workload) -> bool:
        """Return whether every product of a space and the rest of its model were measured."""
        shapes = {
            (matrix.N, matrix.K, str(fmt.effective(matrix.K)))
            for matrix in space.model.multiplied
            for fmt in space.formats
        }
        return shapes <= set(self._points) and any(rest.shape == shape_of(workload) for rest in self.rests)

    def matrix_seconds(self, N: int, K: int, fmt: WeightFormat, tokens: int) -> float:
        """Return the seconds of one product, interpolated linearly between measured numbers of tokens, and beyond.

        Raises:
            ConfigError: the product was not measured.
        """
        points = self._points.get((N, K, str(fmt.effective(K))))
        if points is None:
            raise ConfigError(f"no timings of a product {K} × {N} in {fmt}; measure them (coatrt devices calibrate)")
        return _line(points, tokens)

    def rest_seconds(self, model: ModelMatrices, workload: Workload, tokens: int, context: int) -> float:
        """Return the seconds of all else, linear in tokens and slots through the measured calls."""
        shape = shape_of(workload)
        rows = sorted((rest.tokens, rest.context, rest.seconds) for rest in self.rests if rest.shape == shape)
        if not rows:
            raise ConfigError(f"no timings of this model on {self.device}; measure them (coatrt devices calibrate)")
        by_tokens = groupby(rows, key=itemgetter(0))
        points = [(count, _line([row[1:] for row in group], context)) for count, group in by_tokens]
        return max(_line(points, tokens), 0.0)

    @classmethod
    def load(cls, path: str | Path) -> "MeasuredLatency":
        """Return the timings in a file.

        Raises:
            ConfigError: it is missing, garbled, or of another format.
        """
        return read_as(path, cls, "timings", "measure again", version=_FORMAT, sealed=True)


def _line(points: list[tuple[int, float]], at: int) -> float:
    """Return the value on the lines between points; the last line is extended, a single point grows in proportion."""
    if len(points) == 1:
        place, value = points[0]
        return value * max(at / place, 1.0)
    (x0, y0), (x1, y1) = next((pair for pair in pairwise(points) if at <= pair[1][0]), points[-2:])
    return y0 + (y1 - y0) * max(at - x0, 0) / (x1 - x0)


def timings_path(device: str, backend: TimedBackend = "ort") -> Path:
    """Return the path of the timings of a device and a backend, in the user's cache directory."""
    return cache_directory() / "timings" / f"{device}-{backend}.json"


def find_timings(device: DeviceProfile, space: ConfigSpace, workload: Workload) -> MeasuredLatency | None:
    """Return the stored timings of a device that cover a space, else None.

    On a GPU, timings of engines come before those of ONNX Runtime.

    Raises:
        ConfigError: a file is garbled.
    """
    for backend in _RUNTIMES[device.builder]:
        path = timings_path(device.id, backend)
        if is_cached(path) and (timings := MeasuredLatency.load(path)).covers(space, workload):
            return timings
    return None
