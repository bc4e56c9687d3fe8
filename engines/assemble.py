"""Adapter + configuration + device → bundle: graphs, hypernetwork, emitted LoRA, engine, tokenizer, manifest."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coatrt.adapter import Adapter
from coatrt.bundle import Bundle, seal
from coatrt.checkpoint import Checkpoint, load_tokenizer
from coatrt.config import QuantConfig
from coatrt.devices import DeviceProfile
from coatrt.engines.builder import EngineShapes, build_engine, check_formats, installed_builder
from coatrt.engines.emit import Emitter, save_lora
from coatrt.engines.environment import versions
from coatrt.errors import BuildError, ConfigError
from coatrt.export.decoder import WEIGHTS_FILE, GraphForm, Progress, decoder_io, export_decoder
from coatrt.export.hypernetwork import export_hypernetwork
from coatrt.files import atomic_directory, read_json, write_json
from coatrt.plan import Plan
from coatrt.store import CodeStore

__all__ = ["BundleOptions", "assemble", "check_output", "export_files"]

Tell = Callable[[str], None]


@dataclass(frozen=True)
class BundleOptions:
    """What goes into a bundle.

    Args:
        activations: of the engine form: float16 or bfloat16.
        cpu_activations: of the cpu form: float32 or float16.
        context: slots of the KV cache per sequence in the engine form.
        shapes: ranges of the engine's dynamic dimensions.
        engine: whether an engine is built where the device's builder can do so here.
    """

    activations: str = "float16"
    cpu_activations: str = "float32"
    context: int = 2048
    shapes: EngineShapes = field(default_factory=EngineShapes)
    engine: bool = True

    def forms(self) -> tuple[GraphForm, GraphForm]:
        """Return the two forms of the graph."""
        return (
            GraphForm("engine", "base.onnx", self.activations, self.context),
            GraphForm("cpu", "cpu.onnx", self.cpu_activations),
        )


def export_files(
    adapter: Adapter,
    checkpoint: Checkpoint,
    config: QuantConfig,
    directory: Path,
    options: BundleOptions,
    *,
    codes: CodeStore | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write everything of a bundle but engine and manifest, and return the manifest's facts about it.

    Args:
        adapter: the trained adapter.
        checkpoint: its model.
        config: the configuration.
        directory: an existing directory.
        options: see `BundleOptions`.
        codes: cache of encoded matrices; by default the adapter's.
        progress: called after every matrix.

    Raises:
        ConfigError: the configuration does not fit the model or the adapter.
    """
    adapter.encoder.format_ids(config)  # refuses what the adapter cannot serve before anything is written
    forms = options.forms()
    codes = codes or adapter.codes(checkpoint)
    contract = adapter.contract
    export_decoder(checkpoint, config, directory, forms=forms, contract=contract, codes=codes, progress=progress)
    config.save(directory / "configuration.json")
    contract.save(directory / "lora_io.json")
    export_hypernetwork(adapter, directory)
    side = read_json(directory / "hypernet.json", "hypernetwork description")
    emitted = Emitter(directory / "hypernet.onnx", side, contract).emit(config)
    save_lora(directory / "lora.safetensors", emitted, config)
    tokenizer = load_tokenizer(checkpoint.directory)
    tokenizer.save_pretrained(str(directory / "tokenizer"))
    decoders = {
        form.name: {"file": form.file, "weights": WEIGHTS_FILE, "io": decoder_io(checkpoint, form).to_json()}
        for form in forms
    }
    return {
        "model": {
            "source": adapter.source,
            "fingerprint": adapter.fingerprint,
            "family": checkpoint.model_type,
            "stop_tokens": _stop_tokens(checkpoint, tokenizer),
        },
        "configuration": {
            "file": "configuration.json",
            "hash": config.hash,
            "average_bits": config.average_bits(adapter.model),
            "bytes": config.nbytes(adapter.model),
            "errors": _errors(adapter, config),
        },
        "matrices": adapter.model.to_json(),
        "quantizer": adapter.quantizer,
        "decoders": decoders,
        "lora": "lora.safetensors",
        "engines": [],
        "versions": versions(),
    }


def _errors(adapter: Adapter, config: QuantConfig) -> dict[str, float]:
    """Return the relative error of every matrix whose format the adapter measured."""
    measured = adapter.sensitivity.errors
    return {
        name: measured[name][str(fmt)] for name, fmt in config.formats.items() if str(fmt) in measured.get(name, {})
    }


def _stop_tokens(checkpoint: Checkpoint, tokenizer: Any) -> list[int]:
    """Return every token that ends a text, as generation settings, configuration or tokenizer name them."""
    found: list[Any] = [tokenizer.eos_token_id, checkpoint.config.get("eos_token_id")]
    path = checkpoint.directory / "generation_config.json"
    if path.is_file():
        found.append(read_json(path, "generation settings").get("eos_token_id"))
    flat = [token for entry in found for token in (entry if isinstance(entry, list) else [entry])]
    return sorted({int(token) for token in flat if token is not None})


def assemble(
    adapter: Adapter,
    checkpoint: Checkpoint,
    config: QuantConfig,
    device: DeviceProfile,
    output: str | Path,
    options: BundleOptions | None = None,
    *,
    also: Iterable[DeviceProfile] = (),
    plan: Plan | None = None,
    codes: CodeStore | None = None,
    progress: Progress | None = None,
    tell: Tell | None = None,
    overwrite: bool = False,
) -> Bundle:
    """Make the bundle of one configuration for a device; nothing is visible at `output` before it is complete.

    A device whose builder cannot run here (regular TensorRT builds on the device itself) gets a bundle without an
    engine: graph, weights and LoRA are all in it, and `tell` says what is missing.

    Args:
        adapter: the trained adapter.
        checkpoint: its model.
        config: the configuration.
        device: the target.
        output: the directory to write.
        options: see `BundleOptions`.
        also: further devices that the same engine must serve.
        plan: why this configuration; kept as plan.json.
        codes: cache of encoded matrices.
        progress: called after every matrix.
        tell: called with a line for the user.
        overwrite: replace a bundle that is there already.

    Raises:
        FormatError: a device cannot run a format.
        BuildError: the builder is not installed or refuses the graph.
        ConfigError: the configuration does not fit, or `output` is in use.
    """
    output, options = Path(output), options or BundleOptions()
    others = tuple(also)
    for target in (device, *others):
        check_formats(config, target, options.activations)
    check_output(output, overwrite)
    wanted = options.engine and device.builder != "onnxruntime"
    if wanted and device.builder == "tensorrt-rtx":
        installed_builder(device.builder)
    with atomic_directory(output) as temporary:
        facts = export_files(adapter, checkpoint, config, temporary, options, codes=codes, progress=progress)
        facts["device"] = device.to_json()
        if plan is not None:
            write_json(temporary / "plan.json", plan.to_json())
        if wanted:
            facts["engines"] = _engines(temporary, device, others, options, tell or (lambda _: None))
        seal(temporary, facts)
    return Bundle.open(output)


def _engines(
    directory: Path, device: DeviceProfile, also: tuple[DeviceProfile, ...], options: BundleOptions, tell: Tell
) -> list[Mapping[str, Any]]:
    name = "-".join(f"sm{sm}" for sm in sorted({device.sm, *(other.sm for other in also)})) + ".engine"
    try:
        record = build_engine(directory / "base.onnx", directory / name, device, also=also, shapes=options.shapes)
    except BuildError as error:
        if device.builder == "tensorrt-rtx":
            raise
        tell(f"{device.id}: no engine here ({error}); base.onnx in the bundle is what to build on the device")
        return []
    return [record.to_json()]


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output directory that holds something, unless it is a bundle that may be replaced.

    Raises:
        ConfigError: it does.
    """
    if output.is_file():
        raise ConfigError(f"{output} is a file; give a directory")
    if output.is_dir() and any(output.iterdir()):
        if not (output / "manifest.json").is_file():
            raise ConfigError(f"{output} holds other files; give a new directory")
        if not overwrite:
            raise ConfigError(f"{output} holds a bundle; give a new directory, or --overwrite to replace it")
