"""What every reader of quantized checkpoints shares: tensors by name, strict keys, patterns of module names."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from coatrt.errors import CheckpointError, reason
from coatrt.models.quantized.matrix import PackedMatrix
from coatrt.models.weight_files import StoredTensor

__all__ = ["Reading", "Tensors", "check_keys", "matches", "sixteen_bits"]

_MAX_PATTERN = 300  # characters
_MAX_QUANTIFIERS = 6  # of a pattern: more could take for ever on a name


@dataclass(frozen=True)
class Reading:
    """A quantized checkpoint, understood but not yet decoded.

    Args:
        method: what wrote it, such as "GPTQ".
        matrices: module name → reader of its matrix.
        used: names of the tensors that these read.
        ignored: names of tensors that do not change the weights: scales of activations and of the KV cache.
        notes: what the checkpoint asks for and coatrt leaves out, as clauses for one line.
    """

    method: str
    matrices: Mapping[str, Callable[[], PackedMatrix]]
    used: frozenset[str]
    ignored: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


class Tensors:
    """The tensors of a checkpoint by name.

    Args:
        directory: its directory, for messages.
        stored: its tensors.
    """

    def __init__(self, directory: Path, stored: Mapping[str, StoredTensor]) -> None:
        self.directory, self.stored = directory, stored

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def modules(self, part: str) -> list[str]:
        """Return the modules that have a tensor of the name `part`."""
        return [name.removesuffix(f".{part}") for name in self.stored if name.endswith(f".{part}")]

    def get(self, name: str, dtypes: Iterable[str] = (), dimensions: int | None = None) -> Tensor:
        """Return a copy of a tensor.

        Args:
            name: its name.
            dtypes: allowed dtypes, as safetensors names them; none: any.
            dimensions: required number of dimensions; None: any.

        Raises:
            CheckpointError: it is missing, damaged, or of another dtype or number of dimensions.
        """
        if name not in self.stored:
            raise self.error(f"has no tensor {name}; download the model again")
        tensor, allowed = self.stored[name], tuple(dtypes)
        if allowed and tensor.dtype not in allowed:
            raise self.error(f"holds {name} as {tensor.dtype}, not {' or '.join(allowed)}; download the model again")
        if dimensions is not None and len(tensor.shape) != dimensions:
            raise self.error(f"holds {name} with the shape {list(tensor.shape)}; it needs {dimensions} dimensions")
        try:
            with safe_open(str(tensor.file), framework="pt") as shard:
                value: Tensor = shard.get_tensor(name).clone()
        except (SafetensorError, OSError) as error:
            raise self.error(f"cannot be read ({reason(error)}); download it again") from None
        return value

    def error(self, what: str) -> CheckpointError:
        """Return an error about the checkpoint; `what` follows its path."""
        return CheckpointError(f"{self.directory} {what}")


def check_keys(where: str, value: Any, known: Iterable[str]) -> dict[str, Any]:
    """Return an object of a quantization configuration whose keys are all known.

    Raises:
        CheckpointError: it is not an object, or has another key.
    """
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is a {type(value).__name__}, not an object; download the model again")
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise CheckpointError(
            f"{where} has the key {', '.join(map(repr, unknown[:3]))}, which coatrt does not know and so cannot "
            "honour; give the model before quantization"
        )
    return value


def matches(pattern: str, name: str) -> bool:
    """Return whether a regular expression matches the start of a module's name.

    Raises:
        CheckpointError: it is not a regular expression, or one that could run for ever.
    """
    quantifiers = re.findall(r"(?<![\\(])[*+?{]", pattern)
    if len(pattern) > _MAX_PATTERN or len(quantifiers) > _MAX_QUANTIFIERS or re.search(r"\)[*+{]", pattern):
        raise CheckpointError(
            f"the quantization configuration has the pattern {pattern[:60]!r}; allowed: at most {_MAX_PATTERN} "
            f"characters and {_MAX_QUANTIFIERS} quantifiers, no repeated group; give the model before quantization"
        )
    try:
        return re.match(pattern, name) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(
            f"the quantization configuration has the pattern {pattern[:60]!r}, which is not a regular expression "
            f"({error}); download the model again"
        ) from None


def sixteen_bits(scales: Tensor, config: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype of decoded weights: that of the scales if they have 16 bits, else the model's."""
    if scales.dtype in (torch.float16, torch.bfloat16):
        return scales.dtype
    named = str(config.get("dtype") or config.get("torch_dtype"))
    return torch.float16 if named.endswith("float16") and not named.endswith("bfloat16") else torch.bfloat16
