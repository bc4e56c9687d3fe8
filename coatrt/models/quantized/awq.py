"""AWQ checkpoints (AutoAWQ, llm-awq's gemm layout): 4 bits with zero points, eight columns interleaved in a word."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from coatrt.errors import CheckpointError
from coatrt.models.quantized.bits import unpack_words
from coatrt.models.quantized.matrix import PackedMatrix
from coatrt.models.quantized.reading import Reading, Tensors, check_keys, sixteen_bits

__all__ = ["read_awq"]

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column of each 4 bits of a word, low bits first
_HOW = ("do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "backend", "provider")
_KEYS = ("quant_method", "bits", "group_size", "zero_point", "version", "modules_to_not_convert", *_HOW)


def read_awq(config: Mapping[str, Any], quantization: Mapping[str, Any], tensors: Tensors) -> Reading:
    """Return what an AWQ checkpoint holds; which modules are quantized, the files say.

    Args:
        config: content of config.json.
        quantization: its quantization_config.
        tensors: the tensors of the files.

    Raises:
        CheckpointError: a key, version or tensor is unknown, or configuration and files differ.
    """
    where = f"quantization_config of {tensors.directory}"
    check_keys(where, quantization, _KEYS)
    bits, group, version = quantization.get("bits"), quantization.get("group_size"), quantization.get("version", "gemm")
    if bits != 4 or type(group) is not int or not (group == -1 or group > 0) or str(version).lower() != "gemm":
        raise CheckpointError(
            f"{where} asks for {bits} bits in groups of {group}, version {version!r}; allowed: 4 bits, groups of 1 or "
            "more, -1 for whole rows, version gemm; save it with AutoAWQ's version GEMM"
        )
    excluded = quantization.get("modules_to_not_convert") or []
    if not isinstance(excluded, list) or not all(isinstance(name, str) for name in excluded):
        raise CheckpointError(f"{where}: modules_to_not_convert is not a list of names; download the model again")
    matrices, used = {}, set()
    for module in tensors.modules("qweight"):
        if any(name in module for name in excluded):
            raise CheckpointError(f"{where} excludes {module}, the files hold it quantized; download the model again")
        matrices[module] = functools.partial(_read, tensors, module, max(group, 0), config)
        used |= {f"{module}.{part}" for part in ("qweight", "qzeros", "scales")}
    return Reading("AWQ", matrices, frozenset(used))


def _columns(words: Tensor) -> Tensor:
    """Return the codes [rows, 8 · words] of words [rows, words], columns in order."""
    codes = unpack_words(words, 4).view(len(words), -1, 8)
    return codes[:, :, torch.tensor(_ORDER).argsort()].reshape(len(words), -1)


def _read(tensors: Tensors, module: str, group: int, config: Mapping[str, Any]) -> PackedMatrix:
    levels = _columns(tensors.get(f"{module}.qweight", ["I32"], 2)).short()  # [K, N]
    points = _columns(tensors.get(f"{module}.qzeros", ["I32"], 2)).short()  # [groups, N]
    stored = tensors.get(f"{module}.scales", ["F16", "BF16", "F32"], 2)  # [groups, N]
    K, N = levels.shape
    width = min(group or K, K) or 1
    if points.shape != stored.shape or stored.shape != (-(-K // width), N):
        raise tensors.error(
            f"holds {module} [{N}, {K}] in groups of {width} with scales {list(stored.shape)} and zero points for "
            f"{list(points.shape)}; download it again"
        )
    levels -= points.repeat_interleave(width, 0)[:K]
    scales = stored.t().float().contiguous()
    return PackedMatrix(levels.t().contiguous(), scales, group, 4, sixteen_bits(stored, config))
