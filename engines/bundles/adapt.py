"""Emits the LoRA of any configuration with a bundle's hypernetwork, as a file, without torch or the base model."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import DTypeLike, NDArray

from coatrt.adapter.peft_format import write_emitted_peft
from coatrt.bundle import Bundle
from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import LoraContract
from coatrt.engines.runtime.emitter import Emitter
from coatrt.engines.runtime.lora_file import save_lora
from coatrt.errors import ConfigError
from coatrt.system.files import atomic_file

__all__ = ["Emission", "LoraFormat", "adapt", "write_onnx_adapter"]

LoraFormat = Literal["safetensors", "peft", "onnx-adapter"]

_VERSION_DIGITS = 7


@dataclass(frozen=True)
class Emission:
    """An emitted LoRA.

    Args:
        config: the configuration.
        tensors: number of LoRA tensors.
        seconds: time to emit them, without loading and writing.
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
        format: "safetensors", "peft" or "onnx-adapter".

    Raises:
        ConfigError: the file format is unknown, the adapter was not trained for a weight format of the configuration,
            or the output is in the bundle or a directory with files.
        BundleError: a file of the bundle was altered.
    """
    if format not in get_args(LoraFormat):
        raise ConfigError(f"format must be one of {', '.join(get_args(LoraFormat))}, got {format!r}")
    output = Path(output)
    if output.resolve().is_relative_to(bundle.directory.resolve()):
        raise ConfigError(f"{output} lies inside the bundle, whose files are sealed; give a path outside")
    if output.is_dir() and any(output.iterdir()):
        raise ConfigError(f"not an empty directory: {output}; give a new path")
    config = config or bundle.config
    for facts in bundle.manifest["decoders"].values():  # an altered graph makes the whole bundle untrustworthy
        bundle.graph(facts["file"], facts["weights"])
    emitter = Emitter.of(bundle)
    start = time.perf_counter()
    tensors = emitter.emit(config)
    seconds = time.perf_counter() - start
    if format == "peft":
        write_emitted_peft(output, tensors, emitter.contract, str(bundle.manifest["model"]["source"]))
    elif format == "onnx-adapter":
        write_onnx_adapter(output, tensors, emitter.contract, _activations(bundle))
    else:
        save_lora(output, tensors, config)
    return Emission(config, len(tensors), seconds)


def _activations(bundle: Bundle) -> str:
    """Return the dtype of the LoRA inputs of the graph that an ONNX Runtime adapter is for: the cpu form."""
    decoder = bundle.manifest["decoders"].get("cpu")
    return decoder["io"].activations if decoder is not None else "float32"


def write_onnx_adapter(
    path: str | Path,
    tensors: Mapping[str, NDArray[np.float32]],
    contract: LoraContract,
    activations: DTypeLike = np.float32,
) -> None:
    """Write emitted tensors as ONNX Runtime's `.onnx_adapter`, for `RunOptions.add_active_adapter`.

    It contains the inputs of the graph, joined by fused group as in the contract. Its model version, an int32, is the
    first seven hexadecimal digits of the configuration's hash.

    Args:
        path: the file.
        tensors: every tensor of the contract.
        contract: their names and shapes.
        activations: dtype of the graph's LoRA inputs.
    """
    import onnxruntime as ort

    adapter = ort.AdapterFormat()
    inputs = contract.graph_inputs(tensors, activations)
    adapter.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in inputs.items()})
    adapter.set_model_version(int(getattr(tensors, "configuration", "")[:_VERSION_DIGITS] or "0", 16))
    with atomic_file(path) as temporary:
        try:
            adapter.export_adapter(str(temporary))
        except RuntimeError:  # its message has no reason: write as much again, for the system's own error
            temporary.write_bytes(bytes(sum(value.nbytes for value in inputs.values())))
            raise
