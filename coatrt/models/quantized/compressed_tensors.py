"""compressed-tensors checkpoints (llm-compressor, vLLM): pack-quantized, int- and float-quantized, NVFP4."""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from coatrt.errors import CheckpointError
from coatrt.models.matrices import EMBEDDING
from coatrt.models.quantized.bits import unpack_nibbles, unpack_words
from coatrt.models.quantized.matrix import PackedMatrix
from coatrt.models.quantized.reading import Reading, Tensors, check_keys, matches, sixteen_bits

__all__ = ["read_compressed_tensors"]

_NEWEST = 20  # 0.20 of compressed-tensors, whose loader the tests compare with
_KEYS = (
    *("quant_method", "version", "format", "quantization_status", "config_groups", "ignore", "kv_cache_scheme"),
    *("global_compression_ratio", "sparsity_config", "transform_config", "moe_sparsity_config"),
)
_GROUP_KEYS = ("targets", "weights", "input_activations", "output_activations", "format")
_ARGUMENTS = (
    *("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder"),
    *("scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
)
_BITS: Mapping[str, tuple[int, ...]] = {
    "pack-quantized": (2, 3, 4, 8),
    "int-quantized": (8,),
    "float-quantized": (8,),
    "naive-quantized": (8,),
    "nvfp4-pack-quantized": (4,),
}
"""Format of storage → bits that are read."""
_KINDS: Mapping[str, tuple[str, ...]] = {
    "pack-quantized": ("int",),
    "int-quantized": ("int",),
    "float-quantized": ("float",),
    "nvfp4-pack-quantized": ("float",),
}
_STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")
_PARTS = (
    *("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    "weight_global_scale",
)
_ACTIVATIONS = re.compile(r"(input|output|k|v|q)_(scale|zero_point|global_scale)")
_SCALES = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class _Scheme:
    """The checked arguments of a group's weights."""

    storage: str  # one of _BITS
    bits: int
    is_float: bool
    symmetric: bool
    strategy: str
    group: int
    block: tuple[int, int]


def read_compressed_tensors(config: Mapping[str, Any], quantization: Mapping[str, Any], tensors: Tensors) -> Reading:
    """Return what a compressed-tensors checkpoint holds.

    Args:
        config: content of config.json.
        quantization: its quantization_config.
        tensors: the tensors of the files.

    Raises:
        CheckpointError: a key, version, scheme or tensor is unknown, or configuration and files differ.
    """
    where = f"quantization_config of {tensors.directory}"
    check_keys(where, quantization, _KEYS)
    _check_version(where, quantization)
    for key, harmless in (("sparsity_config", "dense"), ("transform_config", None), ("moe_sparsity_config", None)):
        value = quantization.get(key)
        if value and (harmless is None or not isinstance(value, dict) or value.get("format") != harmless):
            raise CheckpointError(f"{where} has a {key}, which changes the weights; give the model before compression")
    targets: dict[str, _Scheme] = {}
    notes = []
    if quantization.get("kv_cache_scheme"):
        notes.append("its KV cache is not quantized here")
    for name, group in _groups(where, quantization).items():
        place = f"{where}: config_groups.{name}"
        check_keys(place, group, _GROUP_KEYS)
        if group.get("input_activations") or group.get("output_activations"):
            for part in ("input_activations", "output_activations"):
                check_keys(f"{place}.{part}", group.get(part) or {}, _ARGUMENTS)
            notes.append("its activations are not quantized here")
        if group.get("weights") is None:
            continue
        scheme = _scheme(place, group, str(group.get("format") or quantization.get("format")))
        for target in _texts(f"{place}.targets", group.get("targets")):
            targets[target] = scheme
    ignore = _texts(f"{where}: ignore", quantization.get("ignore") or [])
    matrices, used, ignored = {}, set(), set()
    modules: dict[str, set[str]] = {}
    for tensor in tensors.stored:
        module, _, part = tensor.rpartition(".")
        if _ACTIVATIONS.fullmatch(part):
            ignored.add(tensor)
        elif part in _PARTS:
            modules.setdefault(module, set()).add(part)
    for module, parts in modules.items():
        expected = _expected(module, targets, ignore, tensors)
        if (parts == {"weight"}) != (expected is None):
            state = "plain" if parts == {"weight"} else "quantized"
            raise CheckpointError(
                f"{where}: by its targets and ignore list {module} is {'not ' if expected is None else ''}quantized, "
                f"the files hold it {state}; download the model again"
            )
        if expected is not None:
            matrices[module] = functools.partial(_read, tensors, module, expected, config)
            used |= {f"{module}.{part}" for part in parts}
    version = str(quantization.get("version", "")).strip()
    return Reading(
        f"compressed-tensors {version}".strip(),
        matrices,
        frozenset(used),
        frozenset(ignored),
        tuple(dict.fromkeys(notes)),
    )


def _check_version(where: str, quantization: Mapping[str, Any]) -> None:
    version = quantization.get("version")
    match = re.match(r"0\.(\d{1,4})(\D|$)", version) if isinstance(version, str) else None
    if version is not None and (match is None or int(match[1]) > _NEWEST):
        raise CheckpointError(
            f"{where} has the version {version!r}; coatrt reads up to 0.{_NEWEST} of compressed-tensors; "
            "give the model before quantization"
        )
    status = quantization.get("quantization_status", "compressed")
    if status not in ("compressed", "frozen"):
        raise CheckpointError(f"{where} has the status {status!r}, not 'compressed'; save the model compressed")


def _groups(where: str, quantization: Mapping[str, Any]) -> dict[str, Any]:
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{where} has no config_groups; download the model again")
    return groups


def _texts(where: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise CheckpointError(f"{where} is not a list of names; download the model again")
    return value


def _scheme(place: str, group: Mapping[str, Any], storage: str) -> _Scheme:
    weights = check_keys(f"{place}.weights", group["weights"], _ARGUMENTS)
    if storage not in _BITS:
        raise CheckpointError(f"{place} has the format {storage!r}; allowed: {', '.join(_BITS)}")
    bits, kind, size = weights.get("num_bits"), weights.get("type", "int"), weights.get("group_size")
    group_size = size if type(size) is int and size > 0 else 0
    strategy = weights.get("strategy") or ("group" if group_size else "channel" if size == -1 else "tensor")
    structure = weights.get("block_structure")
    if isinstance(structure, str):  # of early versions: "128x128"
        structure = [int(part) for part in structure[:20].split("x") if part.isdecimal()]
    block = structure if isinstance(structure, list) and all(type(n) is int for n in structure) else [1, 1]
    is_float = kind == "float"
    valid = (
        type(bits) is int
        and bits in _BITS[storage]
        and kind in _KINDS.get(storage, ("int", "float"))
        and strategy in _STRATEGIES
        and (strategy in ("group", "tensor_group")) == (group_size > 0)
        and len(block) == 2
        and min(block) >= 1
        and weights.get("dynamic", False) is False
        and type(weights.get("symmetric", True)) is bool
    )
    if not valid:
        raise CheckpointError(
            f"{place}.weights asks for {bits} bits of {kind}, strategy {strategy}, group_size {size}, in {storage}, "
            "which coatrt does not read; give the model before quantization"
        )
    for key in ("scale_dtype", "zp_dtype"):  # the files say which dtype is stored
        if not isinstance(weights.get(key), str | None):
            raise CheckpointError(f"{place}.weights.{key} is not a dtype; download the model again")
    return _Scheme(
        storage, int(bits or 0), is_float, weights.get("symmetric", True), strategy, group_size, (block[0], block[1])
    )


def _expected(module: str, targets: Mapping[str, _Scheme], ignore: list[str], tensors: Tensors) -> _Scheme | None:
    """Return the scheme of a module: the first match by name, else by pattern, else by class."""
    weight = tensors.stored.get(f"{module}.weight")
    if weight is not None and len(weight.shape) != 2:  # a norm
        return None
    kind = "Embedding" if module == EMBEDDING else "Linear"

    def match(target: str) -> bool:
        if target.startswith("re:"):
            return matches(target.removeprefix("re:"), module)
        return target in (module, kind) or (target == "LinearBase" and kind == "Linear")

    if any(map(match, ignore)):
        return None
    names = sorted(filter(match, targets), key=lambda t: (t == kind, "re:" in t, t))
    return targets[names[0]] if names else None


def _read(tensors: Tensors, module: str, scheme: _Scheme, config: Mapping[str, Any]) -> PackedMatrix:
    name = f"{module}.weight"
    if scheme.storage == "nvfp4-pack-quantized":
        levels = unpack_nibbles(tensors.get(f"{name}_packed", ["U8"], 2))
        scales = tensors.get(f"{name}_scale", ["F8_E4M3"], 2).float()
        factor = tensors.get(f"{name}_global_scale", ["F32"]).flatten()
        if len(factor) != 1:
            raise tensors.error(f"holds {name}_global_scale with {len(factor)} values; download it again")
        dtype = torch.bfloat16  # what compressed-tensors decompresses into
        return PackedMatrix(levels, scales, scheme.group, 4, dtype, factor=float(factor), divides=True)
    stored = tensors.get(f"{name}_scale", _SCALES)
    order = tensors.get(f"{name}_g_idx", ["I32", "I64"], 1).long() if f"{name}_g_idx" in tensors else None
    if scheme.storage == "pack-quantized":
        packed = tensors.get(f"{name}_packed", ["I32"], 2)
        shape = tensors.get(f"{name}_shape", ["I64", "I32"], 1).tolist()
        most = packed.shape[1] * 32 // scheme.bits
        if len(shape) != 2 or shape[0] != len(packed) or not most - 32 < shape[1] <= most:
            raise tensors.error(f"holds {name}_packed {list(packed.shape)} for the shape {shape}; download it again")
        levels = unpack_words(packed, scheme.bits)[:, : shape[1]].short() - (1 << (scheme.bits - 1))
    else:
        levels = tensors.get(name, ["F8_E4M3"] if scheme.is_float else ["I8"], 2)
        levels = levels if scheme.is_float else levels.short()
    N, K = levels.shape
    block, scales = _scales(tensors, name, scheme, stored.float(), N, K)
    if not scheme.symmetric:
        if scheme.is_float or order is not None or scheme.strategy == "block":
            raise tensors.error(
                f"has zero points of {name} that coatrt does not read; give the model before quantization"
            )
        zeros = _zeros(tensors, name, scheme, N, scales.shape[1])
        width = min(block or K, K) or 1
        if scales.shape[1] != -(-K // width):
            raise tensors.error(f"holds {scales.shape[1]} scales per row of {name}; download it again")
        levels -= zeros.repeat_interleave(width, 1)[:, :K]
    return PackedMatrix(levels, scales, block, scheme.bits, sixteen_bits(stored, config), order)


def _scales(
    tensors: Tensors, name: str, scheme: _Scheme, stored: torch.Tensor, N: int, K: int
) -> tuple[int, torch.Tensor]:
    """Return the block along K, 0 for whole rows, and the scales [N, groups]."""
    if scheme.strategy == "tensor" and stored.numel() == 1:
        return 0, stored.reshape(1, 1).expand(N, 1)
    if scheme.strategy == "channel" and stored.numel() == N:
        return 0, stored.reshape(N, 1)
    if scheme.strategy == "group" and stored.ndim == 2:
        return scheme.group, stored
    if scheme.strategy == "block" and stored.shape == (-(-N // scheme.block[0]), -(-K // scheme.block[1])):
        return scheme.block[1], stored.repeat_interleave(min(scheme.block[0], N), 0)[:N]
    raise tensors.error(
        f"holds {name}_scale with the shape {list(stored.shape)} for strategy {scheme.strategy}; download it again"
    )


def _zeros(tensors: Tensors, name: str, scheme: _Scheme, N: int, groups: int) -> torch.Tensor:
    """Return the zero points, int16 [N, groups]."""
    stored = tensors.get(f"{name}_zero_point", ["I8", "I32"])
    if stored.dtype == torch.int32 and stored.ndim == 2:
        unpacked = unpack_words(stored.t(), scheme.bits).t().short() - (1 << (scheme.bits - 1))
        stored = unpacked[:N]
    if stored.numel() == 1 and groups == 1:
        return stored.reshape(1, 1).expand(N, 1).short()
    if stored.numel() != N * groups:
        raise tensors.error(f"holds {name}_zero_point {list(stored.shape)}, not [{N}, {groups}]; download it again")
    return stored.reshape(N, groups).short()
