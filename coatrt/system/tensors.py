"""Tensors moved to a device, and safetensors files with a hash of their content, written atomically."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coatrt.system.disk import is_cached
from coatrt.system.files import atomic_file

__all__ = ["hash_tensors", "read_tensors", "to_device", "write_tensors"]

_HASH = "sha256"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a small tensor on a device; the copy to a GPU is asynchronous."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _seal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the hash of the tensors and of all metadata but the hash itself."""
    others = {key: value for key, value in metadata.items() if key != _HASH}
    return hashlib.sha256(f"{hash_tensors(tensors)} {json.dumps(others, sort_keys=True)}".encode()).hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors and metadata with their hash, atomically.

    Args:
        path: the file.
        tensors: any dtype that safetensors has.
        metadata: texts to store with them.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        save_file(contiguous, str(temporary), metadata={**(metadata or {}), _HASH: _seal(contiguous, metadata or {})})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Return tensors and metadata of a file; None if it is missing or damaged, or its hash does not match."""
    if not is_cached(path):
        return None
    try:
        with safe_open(str(path), framework="pt") as shard:
            tensors = {name: shard.get_tensor(name).clone() for name in shard.keys()}  # noqa: SIM118 - no mapping
            metadata = dict(shard.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        return None
    return (tensors, metadata) if metadata.get(_HASH) == _seal(tensors, metadata) else None
