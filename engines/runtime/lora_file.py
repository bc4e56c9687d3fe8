"""LoRA files: the tensors emitted for one configuration, which the file names."""

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
"""Key of the configuration's hash in the metadata of LoRA files, of PEFT's too."""

_AGAIN = "emit it again with coatrt adapt"
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class Lora(dict[str, NDArray[np.float32]]):
    """The tensors of a contract by name, float32.

    Args:
        tensors: by name.
        configuration: hash of the configuration they were emitted for; empty where nobody knows.
    """

    def __init__(self, tensors: Mapping[str, NDArray[np.float32]], configuration: str) -> None:
        super().__init__(tensors)
        self.configuration = configuration


def save_lora(path: str | Path, tensors: Mapping[str, NDArray[np.float32]], config: QuantConfig) -> None:
    """Write emitted tensors as safetensors, atomically, with the hash of their configuration."""
    with atomic_file(path) as temporary:
        save_file(dict(tensors), str(temporary), metadata={CONFIGURATION: config.hash})


def load_lora(path: Path, contract: LoraContract, weights: str = "", *, strict: bool = False) -> Lora:
    """Return the tensors of a LoRA file, checked against the contract; float16 and bfloat16 become float32.

    Args:
        path: the file.
        contract: names and shapes.
        weights: hash of the configuration of the weights it is for: another is said in one line. A decoder that
            `load_decoder` returned does so itself.
        strict: refuse a LoRA of another configuration.

    Raises:
        ConfigError: the file is missing, damaged, not of this contract, of another dtype, not finite, or see `strict`.
    """
    if not path.is_file():
        raise ConfigError(f"LoRA {path} does not exist; emit one with coatrt adapt")
    try:
        data = path.read_bytes()
        stored = deserialize(data)  # type: ignore[no-untyped-call]
        # The header, checked by now, is read again for what the line above does not return.
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
            raise ConfigError(f"LoRA {path}: {name} has numbers that are not finite; {_AGAIN}")
        tensors[name] = value.reshape(facts["shape"])
    try:
        check_lora(contract, tensors)
    except ConfigError as error:
        raise ConfigError(f"LoRA {path}: {error}") from None
    lora = Lora(tensors, str(metadata.get(CONFIGURATION, "")))
    check_configuration(lora.configuration, weights, strict=strict)
    return lora
