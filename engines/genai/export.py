"""A bundle → a directory that onnxruntime-genai loads."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from coatrt.bundle import Bundle
from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import DecoderIO
from coatrt.engines.bundles.adapt import write_onnx_adapter
from coatrt.engines.genai.destination import SUMS, check_destination, write_sums
from coatrt.engines.genai.graph import LORA_FILE, attention_heads, genai_graph
from coatrt.engines.genai.options import GenaiOptions, Provider
from coatrt.engines.genai.settings import CONFIG, MODEL, genai_settings
from coatrt.engines.runtime.emitter import Emitter
from coatrt.engines.runtime.lora_file import Lora, load_lora
from coatrt.errors import BundleError, ConfigError
from coatrt.system.files import atomic_directory
from coatrt.system.json_data import write_json

__all__ = ["ADAPTERS", "GenaiExport", "Variant", "export_genai", "variant_of"]

ADAPTERS = "adapters"
_OWN, _NONE = "lora", "none"


@dataclass(frozen=True)
class GenaiExport:
    """A directory that onnxruntime-genai loads.

    Args:
        directory: where it is.
        provider: where its graph runs.
        adapters: names of the files in adapters/, without their ending.
        nbytes: bytes of all files.
    """

    directory: Path
    provider: Provider
    adapters: tuple[str, ...]
    nbytes: int


def export_genai(
    bundle: Bundle,
    output: str | Path,
    options: GenaiOptions = GenaiOptions(),
    *,
    adapters: Mapping[str, QuantConfig] | None = None,
    overwrite: bool = False,
) -> GenaiExport:
    """Write a bundle as a model directory of onnxruntime-genai; it needs neither torch nor the base model.

    The directory holds the graph, the weights, the LoRA as default values and as adapters, the tokenizer with its chat
    template, genai_config.json, and SHA256SUMS.

    Args:
        bundle: an opened bundle; the hash of every file that is read is checked.
        output: the directory; it appears when it is complete.
        options: see `GenaiOptions`.
        adapters: name → configuration, whose LoRA is written to adapters/NAME.onnx_adapter. The bundle's own is there
            as `lora`, and where it applies by default, one of zeros as `none`.
        overwrite: replace an earlier export.

    Raises:
        ConfigError: the output is in use or lies in the bundle, an adapter's name is taken or not a file name, or see
            `GenaiOptions`.
        BundleError: a file of the bundle was altered.
    """
    output, configs = Path(output), dict(adapters or {})
    if output.resolve().is_relative_to(bundle.directory.resolve()):
        raise ConfigError(f"{output} lies inside the bundle, whose files are sealed; give a path outside")
    for name in configs:
        if name in (_OWN, _NONE, "..", "") or Path(name).name != name or not name.isprintable():
            raise ConfigError(f"an adapter cannot be called {name!r}; give another name, without a slash")
    check_destination(output, overwrite=overwrite)
    variant = variant_of(bundle, options)
    with atomic_directory(output) as temporary:
        shutil.copytree(bundle.folder("tokenizer"), temporary, dirs_exist_ok=True)
        names = variant.write(temporary, configs)
        nbytes = write_sums(temporary)
    return GenaiExport(output, variant.provider, names, nbytes)


@dataclass(frozen=True)
class Variant:
    """A bundle, and how it becomes a directory of onnxruntime-genai.

    Args:
        bundle: the bundle.
        provider: where its graph runs.
        options: see `GenaiOptions`.
    """

    bundle: Bundle
    provider: Provider
    options: GenaiOptions

    def write(self, directory: Path, adapters: Mapping[str, QuantConfig], tokenizer: str = "") -> tuple[str, ...]:
        """Write graph, weights, adapters and genai_config.json; return the names of the adapters.

        Args:
            directory: an existing directory.
            adapters: name → configuration of further LoRAs.
            tokenizer: where the tokenizer is, relative to the directory; empty if it is there.
        """
        import onnx

        bundle, contract = self.bundle, self.bundle.contract
        source, io = bundle.decoder(self.provider)
        weights = bundle.manifest["decoders"][self.provider]["weights"]
        _refuse_clashes(bundle, weights)
        emitter = Emitter.of(bundle) if adapters or "lora" not in bundle.manifest else None
        own = self._own(emitter)
        loras: dict[str, Lora] = {_OWN: own}
        if emitter is not None:
            loras |= {name: emitter.emit(config) for name, config in adapters.items()}
        zeros = Lora({name: np.zeros(shape, np.float32) for name, shape in contract.shapes.items()}, "")
        if self.options.lora == "on":
            loras[_NONE] = zeros
        default = contract.graph_inputs(own if self.options.lora == "on" else zeros, _dtype(io))
        model = genai_graph(source, io, default, directory, all_logits=self.options.all_logits)
        onnx.save(model, directory / MODEL)
        shutil.copyfile(bundle.path(weights), directory / weights)  # the library onnx refuses hard links
        (directory / ADAPTERS).mkdir()
        for name, lora in loras.items():
            write_onnx_adapter(directory / ADAPTERS / f"{name}.onnx_adapter", lora, contract, _dtype(io))
        heads = attention_heads(model)
        settings = genai_settings(bundle, io, self.provider, self.options, heads=heads, tokenizer=tokenizer)
        write_json(directory / CONFIG, settings)
        return tuple(sorted(loras))

    def _own(self, emitter: Emitter | None) -> Lora:
        file = self.bundle.manifest.get("lora")
        if file is None:
            assert emitter is not None, "a bundle without a LoRA file has its emitter opened"
            return emitter.emit(self.bundle.config)
        return load_lora(self.bundle.path(file), self.bundle.contract)


def variant_of(bundle: Bundle, options: GenaiOptions) -> Variant:
    """Return how a bundle is exported; its device says where it runs, unless the options do.

    Raises:
        BundleError: the bundle has no graph for that provider.
    """
    device = bundle.manifest.get("device") or {}
    provider: Provider = options.provider or ("cuda" if device.get("sm") else "cpu")
    if provider not in (decoders := bundle.manifest["decoders"]):
        raise BundleError(f"{bundle.directory} has no {provider} graph, only {', '.join(decoders)}; build it again")
    return Variant(bundle, provider, options)


def _refuse_clashes(bundle: Bundle, weights: str) -> None:
    """Refuse a bundle whose weights or tokenizer have names that the export needs for other files."""
    own = {MODEL, CONFIG, LORA_FILE, SUMS, ADAPTERS}
    tokenizer = {PurePosixPath(name).parts[1] for name in bundle.manifest["files"] if name.startswith("tokenizer/")}
    clashes = sorted((own | {weights}) & tokenizer | own & {weights})
    if PurePosixPath(weights).name != weights:
        clashes.append(weights)
    if clashes:
        raise BundleError(
            f"{bundle.directory} has a file called {clashes[0]}, which an export cannot hold; build it again"
        )


def _dtype(io: DecoderIO) -> np.dtype[Any]:
    return np.dtype(io.activations)
