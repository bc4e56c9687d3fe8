"""Writes a bundle's files except engine and manifest: those all bundles of an adapter share, and a configuration's."""

from pathlib import Path
from typing import Any

from coatrt.adapter.adapter import Adapter
from coatrt.configs.config import QuantConfig
from coatrt.data.chat_template import Refusal, chat_template
from coatrt.devices.environment import versions
from coatrt.engines.bundles.chat_shape import chat_shape
from coatrt.engines.bundles.options import BundleOptions
from coatrt.engines.runtime.emitter import Emitter
from coatrt.engines.runtime.lora_file import save_lora
from coatrt.errors import ConfigError
from coatrt.export.decoder import WEIGHTS_FILE, decoder_io, export_decoder
from coatrt.export.hypernetwork import export_hypernetwork
from coatrt.models.bundle_tokenizer import check_same
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.config_file import end_tokens
from coatrt.models.tokenizer import load_tokenizer
from coatrt.quantization.code_cache import CodeStore
from coatrt.system.json_data import write_json
from coatrt.system.notices import warn_once
from coatrt.system.progress import Progress, silent

__all__ = ["export_config", "export_shared"]


def export_shared(adapter: Adapter, checkpoint: Checkpoint, directory: Path) -> dict[str, Any]:
    """Write hypernetwork, LoRA contract and tokenizer into a directory; return their entries for the manifest."""
    write_json(directory / "lora_io.json", adapter.description.contract)
    export_hypernetwork(adapter, directory)
    tokenizer = load_tokenizer(checkpoint.directory)
    tokenizer.save_pretrained(str(directory / "tokenizer"))
    check_same(tokenizer, directory / "tokenizer")
    _write_chat(tokenizer, directory / "chat.json")
    stop_tokens = end_tokens(checkpoint.directory, checkpoint.config) | ({tokenizer.eos_token_id} - {None})
    return {
        "model": {
            "source": adapter.description.source,
            "fingerprint": adapter.description.fingerprint,
            "family": checkpoint.model_type,
            "stop_tokens": sorted(stop_tokens),
        },
        "matrices": adapter.description.model,
        "quantizer": adapter.description.quantizer,
        "versions": versions(),
    }


def _write_chat(tokenizer: Any, path: Path) -> None:
    """Write what the C++ library renders conversations with, or why it cannot; nothing where there is no template."""
    try:
        template = chat_template(tokenizer)
        if template is None:
            return
        shape = chat_shape(template)
    except ConfigError as error:
        shape = Refusal(str(error))
    if isinstance(shape, Refusal):
        warn_once(f"the chat template cannot be rendered in C++: {shape.reason}; chat is served by Python only")
        write_json(path, {"refusal": f"the model's chat template cannot be rendered in C++: {shape.reason}"})
    else:
        write_json(path, shape.to_json())


def export_config(
    adapter: Adapter,
    checkpoint: Checkpoint,
    config: QuantConfig,
    shared: Path,
    directory: Path,
    options: BundleOptions,
    *,
    codes: CodeStore,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the graphs, weights and LoRA of one configuration; return their entries for the manifest.

    Args:
        adapter: the trained adapter.
        checkpoint: its model.
        config: the configuration.
        shared: the directory that `export_shared` wrote.
        directory: an existing directory.
        options: see `BundleOptions`.
        codes: cache of encoded matrices.
        progress: called after every matrix.

    Raises:
        ConfigError: the configuration does not fit the model or the adapter.
    """
    forms, contract = options.forms(), adapter.description.contract
    export_decoder(checkpoint, config, directory, forms=forms, contract=contract, codes=codes, progress=progress)
    config.save(directory / "configuration.json")
    save_lora(directory / "lora.safetensors", Emitter(shared / "hypernet.onnx", contract).emit(config), config)
    errors = adapter.description.sensitivity.errors  # matrix → format → relative error
    return {
        "configuration": {
            "file": "configuration.json",
            "hash": config.hash,
            "average_bits": config.average_bits(adapter.description.model),
            "bytes": config.nbytes(adapter.description.model),
            "errors": {
                name: errors[name][str(fmt)] for name, fmt in config.formats.items() if str(fmt) in errors.get(name, {})
            },
        },
        "decoders": {
            form.name: {"file": form.file, "weights": WEIGHTS_FILE, "io": decoder_io(checkpoint, form)}
            for form in forms
        },
        "lora": "lora.safetensors",
    }
