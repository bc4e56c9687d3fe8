"""Switching configurations in a running session: loads another bundle's graph or engine and emits its LoRA."""

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coatrt.bundle import Bundle
from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import DecoderIO
from coatrt.engines.runtime.decoder import Decoder, LoraTensors
from coatrt.engines.runtime.emitter import Emitter
from coatrt.engines.runtime.load import check_decoder, load_decoder
from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.engines.runtime.state import State, StatefulDecoder
from coatrt.errors import BundleError, ConfigError

__all__ = ["SwitchResult", "SwitchingDecoder"]


@dataclass(frozen=True)
class SwitchResult:
    """The outcome of a switch; times in seconds.

    Args:
        name: name of the bundle that is current now.
        load_seconds: time to load its graph or engine; 0 if it was in memory.
        emit_seconds: time to emit its LoRA with the hypernetwork.
        bind_seconds: time to bind the LoRA and copy the caches.
        continues: whether the sequences continue where they were; otherwise call `prefill` again.
    """

    name: str
    load_seconds: float
    emit_seconds: float
    bind_seconds: float
    continues: bool


class SwitchingDecoder:
    """A `Decoder` over several bundles of one adapter, one of which is current.

    The hypernetwork is the same in all bundles of an adapter, so one emitter serves every configuration.

    Args:
        bundles: name → opened bundle, at least one; the first is current at the start.
        options: how each bundle runs.
        cache_size: number of decoders to keep in memory; 1 frees the current one before loading the next.

    Raises:
        ConfigError: there is no bundle, or `cache_size` is below 1.
        BundleError: the bundles belong to different models or adapters.
    """

    def __init__(
        self,
        bundles: Mapping[str, Bundle],
        options: RuntimeOptions = RuntimeOptions(),
        *,
        cache_size: int = 1,
    ) -> None:
        if not bundles:
            raise ConfigError("no bundle to switch to; give at least one")
        if cache_size < 1:
            raise ConfigError(f"cache_size must be at least 1, got {cache_size}")
        self.bundles, self._cache_size, self._options = dict(bundles), cache_size, options
        self._check()
        self._emitter = Emitter.of(next(iter(bundles.values())), options.threads)
        self._decoders: OrderedDict[str, Decoder] = OrderedDict()
        self._lora: LoraTensors | None = None  # bound to the current decoder
        self.current = ""
        self.switch(next(iter(bundles)))

    def _check(self) -> None:
        (first, bundle), *others = self.bundles.items()
        ours, graph = bundle.manifest, "hypernet.onnx"
        for name, theirs in ((name, bundle.manifest) for name, bundle in others):
            for what, our_hash, their_hash in (
                ("model", ours["model"]["fingerprint"], theirs["model"]["fingerprint"]),
                ("hypernetwork", ours["files"][graph]["sha256"], theirs["files"][graph]["sha256"]),
            ):
                if our_hash != their_hash:
                    raise BundleError(
                        f"{first} and {name} have different {what}s ({our_hash[:12]}, {their_hash[:12]}); "
                        "give bundles of one adapter"
                    )

    def switch(self, name: str, config: QuantConfig | None = None) -> SwitchResult:
        """Make another bundle current and bind the LoRA of its configuration.

        Sequences continue: the caches are copied. Their shapes fit every configuration of the model, and their values
        differ only by the quantization error of the old weights. A switch that fails leaves the session as it was: all
        that can be checked is checked before the old decoder is freed.

        Args:
            name: name of the bundle.
            config: emit the LoRA of this configuration instead of the bundle's own.

        Raises:
            ConfigError: the name is unknown, the adapter was not trained for a format, or the sequences are longer than
                the new decoder's caches.
            BundleError: a file of the bundle was altered.
            BuildError: its graph or engine does not load.
        """
        if name not in self.bundles:
            raise ConfigError(f"unknown bundle {name!r}; allowed: {', '.join(self.bundles)}")
        bundle, old = self.bundles[name], self._decoders.get(self.current)
        stays = old is not None and name == self.current
        state = old.state() if isinstance(old, StatefulDecoder) and not stays else None
        del old
        start = time.perf_counter()
        tensors = self._emitter.emit(config or bundle.config)
        emit_end = time.perf_counter()
        load_seconds = 0.0
        try:
            if name not in self._decoders:
                check_decoder(bundle, self._options.backend)
                self._load(name)
                load_seconds = time.perf_counter() - emit_end
            bind_start = time.perf_counter()
            self._bind(name, tensors, state)
        except BaseException:
            self._restore_current(name, state)
            raise
        continues = stays or (state is not None and isinstance(self._decoders[name], StatefulDecoder))
        self._decoders.move_to_end(name)
        self.current, self._lora = name, tensors
        return SwitchResult(name, load_seconds, emit_end - start, time.perf_counter() - bind_start, continues)

    def _load(self, name: str) -> None:
        """Load a decoder; if the cache is full, free the least recently used ones first."""
        while len(self._decoders) >= self._cache_size:
            self._decoders.popitem(last=False)
        self._decoders[name] = load_decoder(self.bundles[name], self._options)

    def _bind(self, name: str, tensors: LoraTensors | None, state: State | None) -> None:
        decoder = self._decoders[name]
        decoder.set_lora(tensors)
        if state is not None and isinstance(decoder, StatefulDecoder):
            decoder.restore(state)

    def _restore_current(self, name: str, state: State | None) -> None:
        """Restore the current decoder after a failed switch to `name`; reload it if it was freed."""
        if self.current in self._decoders:
            self._decoders.move_to_end(self.current)
        elif self.current:
            self._decoders.pop(name, None)
            self._load(self.current)
            self._bind(self.current, self._lora, state)

    @property
    def decoder(self) -> Decoder:
        """The current decoder.

        Raises:
            ConfigError: a switch failed, and the previous decoder could not be reloaded.
        """
        if self.current not in self._decoders:
            raise ConfigError(f"{self.current} could not be reloaded after a failed switch; switch to a bundle")
        return self._decoders[self.current]

    @property
    def io(self) -> DecoderIO:
        """Inputs and outputs of the current decoder."""
        return self.decoder.io

    @property
    def capacity(self) -> int:
        """Largest number of positions of a sequence, prompt included."""
        return self.decoder.capacity

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Positions filled so far, int64 [B]."""
        return self.decoder.lengths

    def set_lora(self, tensors: LoraTensors | None) -> None:
        """Bind other LoRA tensors until the next switch; None binds zeros."""
        self.decoder.set_lora(tensors)
        self._lora = tensors

    def prefill(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Start new sequences and return the logits after each prompt, float32 [B, V]."""
        return self.decoder.prefill(prompts)

    def decode(self, tokens: Sequence[int | None]) -> NDArray[np.float32]:
        """Append one token to each sequence (None skips it) and return the logits after it, float32 [B, V]."""
        return self.decoder.decode(tokens)
