"""A bundle's hypernetwork at work: the LoRA of any configuration as a file, without torch or the base model."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from coatrt.bundle import Bundle
from coatrt.configs.config import QuantConfig
from coatrt.engines.bundles.lora_formats import write_emitted_peft, write_onnx_adapter
from coatrt.engines.runtime.emitter import Emitter, save_lora
from coatrt.errors import ConfigError

__all__ = ["Emission", "LoraFormat", "adapt"]

LoraFormat = Literal["safetensors", "peft", "onnx-adapter"]


@dataclass(frozen=True)
class Emission:
    """What was emitted.

    Args:
        config: the configuration.
        tensors: number of LoRA tensors.
        seconds: of emitting them, loading and writing aside.
    """

    config: QuantConfig
    tensors: int
    seconds: float


def adapt(
    bundle: Bundle, output: str | Path, config: QuantConfig | None = None, *, format: LoraFormat = "safetensors"
) -> Emission:
    """Emit the LoRA of a configuration and write it.

    Args:
        bundle: an opened bundle; its base model is not read.
        output: the file to write; for "peft" a directory.
        config: the configuration; by default the bundle's own.
        format: "safetensors", "peft" (needs torch) or "onnx-adapter".

    Raises:
        ConfigError: the configuration has a format the adapter was not trained for, or the output is in use.
        BundleError: a file of the bundle was altered.
    """
    if format not in get_args(LoraFormat):
        raise ConfigError(f"format must be one of {', '.join(get_args(LoraFormat))}, got {format!r}")
    output = Path(output)
    if output.is_dir() and any(output.iterdir()):
        raise ConfigError(f"not an empty directory: {output}; give a new path")
    config = config or bundle.config
    emitter = Emitter.of(bundle)
    started = time.perf_counter()
    tensors = emitter.emit(config)
    seconds = time.perf_counter() - started
    if format == "peft":
        write_emitted_peft(output, tensors, emitter.contract, str(bundle.manifest["model"]["source"]))
    elif format == "onnx-adapter":
        write_onnx_adapter(output, tensors)
    else:
        save_lora(output, tensors, config)
    return Emission(config, len(tensors), seconds)
