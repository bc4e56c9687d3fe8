"""A configuration as a compressed-tensors checkpoint, which vLLM and transformers load."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coatrt.export.weights.base import nibbles
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.conversion import ShardWriter, copy_companions
from coatrt.models.matrices import HEAD
from coatrt.quantization.codec import QuantizedMatrix, decode
from coatrt.system.json_data import write_json

__all__ = ["write_compressed_tensors"]

_VERSION = "0.20.0"  # of compressed-tensors, whose loader the tests decode with
_Parts = Mapping[str, Tensor]


def write_compressed_tensors(
    directory: Path, checkpoint: Checkpoint, matrices: Iterator[tuple[str, QuantizedMatrix]]
) -> dict[str, str]:
    """Write config.json, the tokenizer's files and safetensors.

    Embedding and head stay in 16 bits, as do formats that compressed-tensors lacks.

    Args:
        directory: an empty directory.
        checkpoint: the model.
        matrices: (name, encoded matrix) of every matrix.

    Returns:
        matrix → why it is stored in 16 bits.
    """
    copy_companions(checkpoint.directory, directory)
    shards, schemes, dense = ShardWriter(directory), _Schemes(), dict[str, str]()
    for name, matrix in matrices:
        reason = _why_dense(name, matrix)
        parts: _Parts
        if reason:
            if matrix.format.has_scales:
                dense[name] = reason
            parts = {"weight": matrix.codes if not matrix.format.has_scales else decode(matrix, torch.float16)}
            schemes.leave(name)
        else:
            parts = _STORAGES[matrix.format.kind](matrix)
            schemes.add(name, matrix)
        for part, tensor in parts.items():
            shards.add(f"{name}.{part}", tensor)
    names = {f"{name}.weight" for name in checkpoint.matrices.names} | {f"{HEAD}.weight"}
    for name in checkpoint.tensors:
        if name not in names and not name.endswith("rotary_emb.inv_freq"):
            shards.add(name, checkpoint.tensor(name))
    shards.finish()
    config = {key: value for key, value in checkpoint.config.items() if key not in ("torch_dtype", "dtype")}
    config |= {"dtype": "float16", "torch_dtype": "float16"}  # of scales and decoded weights
    if schemes.groups:
        config["quantization_config"] = schemes.to_json()
    write_json(directory / "config.json", config)
    return dense


def _why_dense(name: str, matrix: QuantizedMatrix) -> str:
    """Return why a matrix is stored in 16 bits, empty if it is not."""
    fmt = matrix.format
    if not fmt.has_scales:
        return fmt.kind
    if "." not in name or name == "model.embed_tokens":
        return "embedding and head stay in 16 bits"
    if fmt.is_normal_float:
        return "compressed-tensors has no NormalFloat"
    if fmt.padded(matrix.K) != matrix.K or matrix.K % 8:
        return "compressed-tensors needs whole blocks"
    return ""


class _Schemes:
    """The groups of a quantization_config: the modules of each format, by name."""

    def __init__(self) -> None:
        self.groups: dict[str, dict[str, Any]] = {}
        self._ignored: list[str] = []

    def add(self, name: str, matrix: QuantizedMatrix) -> None:
        """Add a module to the group of its format."""
        fmt = matrix.format
        is_float = fmt.kind in ("fp8", "nvfp4")
        strategy = "tensor_group" if fmt.kind == "nvfp4" else "group" if fmt.block else "channel"
        storage = {"fp8": "float-quantized", "nvfp4": "nvfp4-pack-quantized"}.get(fmt.kind, "pack-quantized")
        weights = {
            "num_bits": fmt.bits,
            "type": "float" if is_float else "int",
            "symmetric": True,
            "strategy": strategy,
            "group_size": fmt.block or None,
            "dynamic": False,
        }
        group = {"targets": [], "weights": weights, "format": storage}
        self.groups.setdefault(str(fmt), group)["targets"].append(name)

    def leave(self, name: str) -> None:
        """Leave a module out of all groups."""
        self._ignored.append(name)

    def to_json(self) -> dict[str, Any]:
        """Return the quantization_config."""
        groups = {f"group_{i}": group for i, group in enumerate(self.groups.values())}
        formats = {group["format"] for group in groups.values()}
        return {
            "quant_method": "compressed-tensors",
            "version": _VERSION,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [name for name in self._ignored if name != "model.embed_tokens"],
            "kv_cache_scheme": None,
        }


def _integers(matrix: QuantizedMatrix) -> _Parts:
    """int4 and int8: codes plus half their range, packed in words of 32 bits, low bits first."""
    bits, (N, K) = matrix.format.bits, matrix.codes.shape
    codes = (matrix.codes.short() + (1 << (bits - 1))).to(torch.uint8)
    data = nibbles(codes).view(N, -1) if bits == 4 else codes
    return {
        "weight_packed": data.contiguous().view(torch.int32),
        "weight_scale": _scales(matrix),
        "weight_shape": torch.tensor([N, K]),
    }


def _fp8(matrix: QuantizedMatrix) -> _Parts:
    return {"weight": matrix.codes, "weight_scale": _scales(matrix)}


def _nvfp4(matrix: QuantizedMatrix) -> _Parts:
    return {
        "weight_packed": nibbles(matrix.codes).view(matrix.N, -1),
        "weight_scale": _scales(matrix),
        "weight_global_scale": torch.tensor([1 / matrix.constant]),  # it divides there
    }


def _scales(matrix: QuantizedMatrix) -> Tensor:
    assert matrix.scales is not None
    return matrix.scales


_STORAGES: Mapping[str, Callable[[QuantizedMatrix], _Parts]] = {
    "int4": _integers,
    "int8": _integers,
    "fp8": _fp8,
    "nvfp4": _nvfp4,
}
