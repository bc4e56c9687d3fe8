"""The bundles of a server: their decoders, their LoRAs, and the names that clients call them by."""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from coatrt.bundle import Bundle
from coatrt.configs.config import ConfigPatterns
from coatrt.devices.environment import usable_cores
from coatrt.engines.runtime.decoder import CachedDecoder
from coatrt.engines.runtime.emitter import Emitter
from coatrt.engines.runtime.load import load_decoder
from coatrt.engines.runtime.lora_file import load_lora
from coatrt.engines.runtime.ort import open_graph
from coatrt.engines.serving.errors import ApiError, invalid
from coatrt.engines.serving.metrics import Metrics
from coatrt.engines.serving.options import ServeOptions
from coatrt.engines.serving.rows import DecoderRows, OrtRows, Rows, RowsLora
from coatrt.engines.serving.scheduler import Scheduler
from coatrt.errors import BuildError, CoatError, ConfigError

__all__ = ["Model", "Models"]

_BASE = "base"
_MOST_EMITTED = 8  # LoRAs of configurations that clients asked for


class Model:
    """A bundle that is loaded.

    Args:
        name: what clients call it.
        bundle: the opened bundle.
        options: how it runs.
        metrics: counts.

    Raises:
        BuildError: its graph does not load, or there is not enough memory.
        BundleError: a file was altered.
    """

    def __init__(self, name: str, bundle: Bundle, options: ServeOptions, metrics: Metrics) -> None:
        self.name, self.bundle = name, bundle
        self.tokenizer = bundle.tokenizer()
        self.ends = frozenset(bundle.manifest["model"]["stop_tokens"])
        rows, counts, io = _rows(bundle, options)
        self.vocabulary, self._dtype = io.vocabulary, np.dtype(io.activations)
        own = load_lora(bundle.path(bundle.manifest["lora"]), bundle.contract)
        self._own, self._base = self._lora(own), self._lora(None)
        self._emitter: Emitter | None = None
        self._emitted: OrderedDict[str, RowsLora] = OrderedDict()
        self._emitting = threading.Lock()
        self.scheduler = Scheduler(rows, counts, options.queue, options.time_limit, metrics)

    @property
    def context(self) -> int:
        """Largest number of tokens of a prompt and its continuation."""
        return self.scheduler.capacity

    def _lora(self, tensors: Any) -> RowsLora:
        return RowsLora(self.bundle.contract, tensors, self._dtype)

    def lora(self, *, base: bool, configuration: Any) -> RowsLora:
        """Return the LoRA of a request; that of a configuration is emitted, which takes a moment.

        Args:
            base: whether the request wants none.
            configuration: JSON data; None for the bundle's own.

        Raises:
            ApiError: both, or the configuration is refused.
        """
        if configuration is None:
            return self._base if base else self._own
        if base:
            raise invalid("configuration", f"{self.name}:{_BASE} runs without a LoRA; name the model {self.name}")
        try:
            config = ConfigPatterns.from_json(configuration, "configuration").resolve(self.bundle.model_matrices)
            with self._emitting:
                if config.hash not in self._emitted:
                    self._emitter = self._emitter or Emitter.of(self.bundle, 1)
                    self._emitted[config.hash] = self._lora(self._emitter.emit(config))
                self._emitted.move_to_end(config.hash)
                while len(self._emitted) > _MOST_EMITTED:
                    self._emitted.popitem(last=False)
                return self._emitted[config.hash]
        except CoatError as error:
            raise invalid("configuration", str(error)) from None


def _rows(bundle: Bundle, options: ServeOptions) -> tuple[list[Rows], list[int], Any]:
    """Return the rows of each worker, how many each may use, and the inputs and outputs of the graph."""
    runtime = options.runtime
    if runtime.backend != "ort":
        decoders = [load_decoder(bundle, replace(runtime, batch=1)) for _ in range(runtime.batch)]
        assert all(isinstance(decoder, CachedDecoder) for decoder in decoders)
        rows: Rows = DecoderRows(decoders)  # type: ignore[arg-type]
        return [rows], [runtime.batch], decoders[0].io
    threads = runtime.threads or 1
    graph, io = bundle.decoder("cpu")
    session, slots = open_graph(graph, io, bundle.contract, replace(runtime, threads=threads))
    workers = max(1, min(usable_cores() // threads, runtime.batch))
    counts = [runtime.batch // workers + (i < runtime.batch % workers) for i in range(workers)]
    try:
        capacity = min(slots - (io.cache_length is not None), io.max_positions)
        return [OrtRows(session, io, count, capacity) for count in counts], counts, io
    except (MemoryError, ValueError):
        raise BuildError(
            f"no memory for {runtime.batch} sequences of {slots} tokens; use a shorter --context or a smaller --batch"
        ) from None


class Models:
    """The models of a server by name.

    Args:
        bundles: name → opened bundle, at least one.
        options: how each runs.
        metrics: counts.

    Raises:
        ConfigError: there is no bundle, or a name has a colon or is empty.
        CoatError: see `Model`.
    """

    def __init__(self, bundles: Mapping[str, Bundle], options: ServeOptions, metrics: Metrics) -> None:
        if not bundles:
            raise ConfigError("no bundle to serve; give at least one")
        for name in bundles:
            if not name or ":" in name or not name.isprintable():
                raise ConfigError(f"a model's name must be a text without colons, got {name!r}; give another one")
        self._models = {name: Model(name, bundle, options, metrics) for name, bundle in bundles.items()}

    def __iter__(self) -> Any:
        return iter(self._models.values())

    @property
    def names(self) -> list[str]:
        """Every name that `find` knows."""
        return [full for name in self._models for full in (name, f"{name}:{_BASE}")]

    def find(self, full: str) -> tuple[Model, bool]:
        """Return the model of a name, and whether it is meant without its LoRA.

        Raises:
            ApiError: there is none.
        """
        if full not in self.names:
            known = ", ".join(self.names)
            message = f"the model {full[:60]!r} does not exist; there are {known}"
            raise ApiError(message, 404, param="model", code="model_not_found")
        name, _, variant = full.partition(":")
        return self._models[name], variant == _BASE
