"""Switching configurations while a session runs: another bundle's graph or engine, its LoRA emitted on the spot."""

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

__all__ = ["Switched", "SwitchingDecoder"]


@dataclass(frozen=True)
class Switched:
    """What a switch took, in seconds.

    Args:
        name: of the bundle switched to.
        load_seconds: of loading its graph or engine; 0 where it was held.
        emit_seconds: of emitting its LoRA with the hypernetwork.
        bind_seconds: of binding the LoRA and moving the caches.
        kept: whether the sequences go on where they were.
    """

    name: str
    load_seconds: float
    emit_seconds: float
    bind_seconds: float
    kept: bool


class SwitchingDecoder:
    """A decoder over several bundles of one adapter, one of them current; a `coatrt.engines.runtime.decoder.Decoder`.

    The hypernetwork is the same in all bundles of an adapter, so one emitter serves every configuration.

    Args:
        bundles: name → opened bundle, at least one; the first is current at the start.
        options: how each runs.
        held: decoders kept in memory; 1 frees the old one before the next is loaded.

    Raises:
        ConfigError: no bundle.
        BundleError: the bundles are of different models or adapters.
    """

    def __init__(
        self,
        bundles: Mapping[str, Bundle],
        options: RuntimeOptions = RuntimeOptions(),
        *,
        held: int = 1,
    ) -> None:
        if not bundles or held < 1:
            raise ConfigError(f"{len(bundles)} bundles and room for {held} decoders are given; give at least 1 each")
        self.bundles, self._held, self._options = dict(bundles), held, options
        self._check()
        self._emitter = Emitter.of(next(iter(bundles.values())), options.threads)
        self._decoders: OrderedDict[str, Decoder] = OrderedDict()
        self._lora: LoraTensors | None = None  # what the current decoder has bound
        self.current = ""
        self.switch(next(iter(bundles)))

    def _check(self) -> None:
        (first, bundle), *others = self.bundles.items()
        one, graph = bundle.manifest, "hypernet.onnx"
        for name, other in ((name, bundle.manifest) for name, bundle in others):
            for what, mine, its in (
                ("model", one["model"]["fingerprint"], other["model"]["fingerprint"]),
                ("hypernetwork", one["files"][graph]["sha256"], other["files"][graph]["sha256"]),
            ):
                if mine != its:
                    raise BundleError(
                        f"{first} and {name} have different {what}s ({mine[:12]}, {its[:12]}); "
                        "give bundles of one adapter"
                    )

    def switch(self, name: str, config: QuantConfig | None = None) -> Switched:
        """Make another bundle current and bind the LoRA of its configuration.

        Sequences go on: the caches are copied, which another precision of the weights leaves valid in shape and nearly
        in value. A switch that fails leaves the session as it was; what can be checked is checked before the old
        decoder is freed.

        Args:
            name: of the bundle.
            config: emit the LoRA of this configuration in place of the bundle's own.

        Raises:
            ConfigError: no such bundle, a format the adapter was not trained for, or the sequences are longer than its
                caches.
            BundleError: a file of the bundle was altered.
            BuildError: its graph or engine does not load.
        """
        if name not in self.bundles:
            raise ConfigError(f"no bundle {name!r}; there are {', '.join(self.bundles)}")
        bundle, old = self.bundles[name], self._decoders.get(self.current)
        goes_on = old is not None and name == self.current
        state = old.state() if isinstance(old, StatefulDecoder) and not goes_on else None
        del old
        started = time.perf_counter()
        tensors = self._emitter.emit(config or bundle.config)
        emitted = time.perf_counter()
        loaded = 0.0
        try:
            if name not in self._decoders:
                check_decoder(bundle, self._options.backend)
                self._load(name)
                loaded = time.perf_counter() - emitted
            before = time.perf_counter()
            self._bind(name, tensors, state)
        except BaseException:
            self._return(name, state)
            raise
        kept = goes_on or (state is not None and isinstance(self._decoders[name], StatefulDecoder))
        self._decoders.move_to_end(name)
        self.current, self._lora = name, tensors
        return Switched(name, loaded, emitted - started, time.perf_counter() - before, kept)

    def _load(self, name: str) -> None:
        """Load a decoder, those longest unused freed first where there is no room."""
        while len(self._decoders) >= self._held:
            self._decoders.popitem(last=False)
        self._decoders[name] = load_decoder(self.bundles[name], self._options)

    def _bind(self, name: str, tensors: LoraTensors | None, state: State | None) -> None:
        decoder = self._decoders[name]
        decoder.set_lora(tensors)
        if state is not None and isinstance(decoder, StatefulDecoder):
            decoder.restore(state)

    def _return(self, failed: str, state: State | None) -> None:
        """Have the current decoder again after a switch to another failed: loaded anew where it was freed."""
        if self.current in self._decoders:
            self._decoders.move_to_end(self.current)
        elif self.current:
            self._decoders.pop(failed, None)
            self._load(self.current)
            self._bind(self.current, self._lora, state)

    @property
    def decoder(self) -> Decoder:
        """The current decoder.

        Raises:
            ConfigError: a switch failed, and so did loading the decoder of before.
        """
        if self.current not in self._decoders:
            raise ConfigError(f"{self.current} could not be loaded again after a failed switch; switch to a bundle")
        return self._decoders[self.current]

    @property
    def io(self) -> DecoderIO:
        """Inputs and outputs of the current decoder."""
        return self.decoder.io

    @property
    def capacity(self) -> int:
        """Most positions of a sequence, prompt included."""
        return self.decoder.capacity

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Positions filled so far, int64 [B]."""
        return self.decoder.lengths

    def set_lora(self, tensors: LoraTensors | None) -> None:
        """Bind other LoRA tensors until the next switch; None: zeros."""
        self.decoder.set_lora(tensors)
        self._lora = tensors

    def prefill(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Start new sequences and return the logits after each prompt, float32 [B, V]."""
        return self.decoder.prefill(prompts)

    def decode(self, tokens: Sequence[int | None]) -> NDArray[np.float32]:
        """Add one token to each sequence, where not None, and return the logits after it, float32 [B, V]."""
        return self.decoder.decode(tokens)
