"""LoRA files: the tensors emitted for one configuration, and the hash of that configuration."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import LoraContract
from coatrt.engines.runtime.decoder import check_configuration, check_lora
from coatrt.errors import ConfigError
from coatrt.system.files import atomic_file
from coatrt.system.json_data import parse_json

__all__ = ["CONFIGURATION", "Lora", "load_lora", "save_lora"]

CONFIGURATION = "configuration"
"""Metadata key of the configuration's hash in LoRA files, PEFT files included."""

_AGAIN = "emit it again with coatrt adapt"
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class Lora(dict[str, NDArray[np.float32]]):
    """The tensors of a contract by name, float32.

    Args:
        tensors: by name.
        configuration: hash of the configuration they were emitted for; empty if unknown.
    """

    def __init__(self, tensors: Mapping[str, NDArray[np.float32]], configuration: str) -> None:
        super().__init__(tensors)
        self.configuration = configuration


def save_lora(path: str | Path, tensors: Mapping[str, NDArray[np.float32]], config: QuantConfig) -> None:
    """Write emitted tensors as a safetensors file, atomically, with the hash of their configuration."""
    with atomic_file(path) as temporary:
        save_file(dict(tensors), str(temporary), metadata={CONFIGURATION: config.hash})


def load_lora(path: Path | str, contract: LoraContract, weights: str = "", *, strict: bool = False) -> Lora:
    """Return the tensors of a LoRA file, checked against the contract; float16 and bfloat16 become float32.

    Args:
        path: the file.
        contract: names and shapes.
        weights: configuration hash of the weights the LoRA is for; a LoRA of another one is warned about in one line.
            Not needed for a decoder that `load_decoder` returned, which checks this itself.
        strict: raise instead of warning.

    Raises:
        ConfigError: the file is missing or damaged, a tensor does not match the contract, has another dtype or values
            that are not finite, or `strict` and the LoRA belongs to another configuration.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"LoRA {path} does not exist; emit one with coatrt adapt")
    try:
        data = path.read_bytes()
        stored = deserialize(data)  # type: ignore[no-untyped-call]
        # deserialize has checked the header but does not return its metadata, so parse it here.
        header = data[8 : 8 + int.from_bytes(data[:8], "little")]
        metadata = parse_json(header, f"the header of LoRA {path}", _AGAIN).get("__metadata__") or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"LoRA {path} is damaged ({error}); {_AGAIN}") from None
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, facts in stored:
        dtype = facts["dtype"]
        if dtype not in _DTYPES:
            raise ConfigError(f"LoRA {path}: {name} is {dtype}; allowed: {', '.join(_DTYPES)}; {_AGAIN}")
        raw = np.frombuffer(facts["data"], _DTYPES[dtype])
        value = (raw.astype("<u4") << 16).view("<f4") if dtype == "BF16" else raw.astype("<f4")
        if not np.isfinite(value).all():
            raise ConfigError(f"LoRA {path}: {name} has values that are not finite; {_AGAIN}")
        tensors[name] = value.reshape(facts["shape"])
    try:
        check_lora(contract, tensors)
    except ConfigError as error:
        raise ConfigError(f"LoRA {path}: {error}") from None
    lora = Lora(tensors, str(metadata.get(CONFIGURATION, "")))
    check_configuration(lora.configuration, weights, strict=strict)
    return lora
