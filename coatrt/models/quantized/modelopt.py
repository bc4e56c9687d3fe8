"""ModelOpt checkpoints (NVIDIA): NVFP4 and FP8, from hf_quant_config.json or config.json."""

import functools
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from coatrt.errors import CheckpointError
from coatrt.models.matrices import EMBEDDING
from coatrt.models.quantized.bits import unpack_nibbles
from coatrt.models.quantized.matrix import PackedMatrix
from coatrt.models.quantized.reading import Reading, Tensors, check_keys, sixteen_bits

__all__ = ["read_modelopt"]

_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4")
_KEYS = (
    *("quant_method", "quant_algo", "config_groups", "ignore", "kv_cache_scheme", "producer", "quantized_layers"),
    *("kv_cache_quant_algo", "exclude_modules", "group_size", "quantization"),
)
_GROUP_KEYS = ("input_activations", "weights", "output_activations", "targets")
_ARGUMENTS = ("dynamic", "num_bits", "type", "group_size", "strategy")
_PARTS = ("weight", "weight_scale", "weight_scale_2")
_ACTIVATIONS = ("input_scale", "k_scale", "v_scale", "k_proj.output_scale", "v_proj.output_scale")


def read_modelopt(config: Mapping[str, Any], quantization: Mapping[str, Any], tensors: Tensors) -> Reading:
    """Return what a ModelOpt checkpoint holds.

    Args:
        config: content of config.json.
        quantization: its quantization_config, or the content of hf_quant_config.json.
        tensors: the tensors of the files.

    Raises:
        CheckpointError: a key, algorithm or tensor is unknown, or configuration and files differ.
    """
    where = f"the quantization configuration of {tensors.directory}"
    settings = check_keys(where, quantization, _KEYS)
    if "quantization" in settings:  # of hf_quant_config.json
        nested = check_keys(where, settings["quantization"], (*_KEYS[1:-1],))
        settings = {**{key: value for key, value in settings.items() if key != "quantization"}, **nested}
    producer = check_keys(f"{where}: producer", settings.get("producer") or {}, ("name", "version"))
    if producer.get("name", "modelopt") != "modelopt":
        raise CheckpointError(f"{where} is of {producer['name']!r}, not modelopt; give the model before quantization")
    _check_groups(where, settings)
    layers = settings.get("quantized_layers") or {}
    if not isinstance(layers, dict):
        raise CheckpointError(f"{where}: quantized_layers is not an object; download the model again")
    excluded = settings.get("ignore", settings.get("exclude_modules")) or []
    if not isinstance(excluded, list) or not all(isinstance(name, str) for name in excluded):
        raise CheckpointError(f"{where}: the list of excluded modules is not a list of names; download the model again")
    notes = ["its activations are not quantized here"]
    if settings.get("kv_cache_scheme") or settings.get("kv_cache_quant_algo"):
        notes.append("its KV cache is not quantized here")
    matrices, used = {}, set()
    ignored = {name for name in tensors.stored if name.endswith(tuple(f".{part}" for part in _ACTIVATIONS))}
    for name, stored in tensors.stored.items():
        module, _, part = name.rpartition(".")
        if part != "weight" or len(stored.shape) != 2 or module == EMBEDDING:
            continue
        algorithm = _algorithm(where, module, settings.get("quant_algo"), layers, excluded)
        is_plain = f"{module}.weight_scale" not in tensors
        if is_plain != (algorithm is None):
            state = "plain" if is_plain else "quantized"
            raise CheckpointError(
                f"{where}: {module} is {algorithm or 'excluded'}, the files hold it {state}; download the model again"
            )
        if algorithm is not None:
            matrices[module] = functools.partial(_read, tensors, module, algorithm, config)
            used |= {f"{module}.{part}" for part in _PARTS if f"{module}.{part}" in tensors}
    version = str(producer.get("version", ""))[:40]
    return Reading(f"ModelOpt {version}".strip(), matrices, frozenset(used), frozenset(ignored), tuple(notes))


def _check_groups(where: str, settings: Mapping[str, Any]) -> None:
    groups = settings.get("config_groups") or {}
    if not isinstance(groups, dict):
        raise CheckpointError(f"{where}: config_groups is not an object; download the model again")
    for name, group in groups.items():
        check_keys(f"{where}: config_groups.{name}", group, _GROUP_KEYS)
        for part in _GROUP_KEYS[:-1]:
            check_keys(f"{where}: config_groups.{name}.{part}", group.get(part) or {}, _ARGUMENTS)


def _algorithm(where: str, module: str, whole: Any, layers: Mapping[str, Any], excluded: list[str]) -> str | None:
    """Return the algorithm of a module; None: it is plain."""
    if whole == "MIXED_PRECISION":
        layer = layers.get(module)
        if layer is None:
            return None
        known = ("quant_algo", "group_size", "has_zero_point", "pre_quant_scale")
        layer = check_keys(f"{where}: quantized_layers.{module}", layer, known)
        algorithm, extra = layer.get("quant_algo"), layer.get("has_zero_point") or layer.get("pre_quant_scale")
    else:
        if any(fnmatchcase(module, name) or module.startswith(f"{name}.") for name in excluded):
            return None
        algorithm, extra = whole, None
    if algorithm not in _ALGORITHMS or extra:
        raise CheckpointError(
            f"{where} has the algorithm {algorithm!r} for {module}; allowed: {', '.join(_ALGORITHMS)}; give the model "
            "before quantization"
        )
    return str(algorithm)


def _read(tensors: Tensors, module: str, algorithm: str, config: Mapping[str, Any]) -> PackedMatrix:
    name = f"{module}.weight"
    if algorithm == "NVFP4":
        levels = unpack_nibbles(tensors.get(name, ["U8"], 2))
        scales = tensors.get(f"{name}_scale", ["F8_E4M3"], 2).float()
        factor = tensors.get(f"{name}_scale_2", ["F32"]).flatten()
        if len(factor) != 1 or scales.shape[1] < 1:
            raise tensors.error(f"holds {name}_scale_2 with {len(factor)} values; download it again")
        block = levels.shape[1] // scales.shape[1]
        return PackedMatrix(levels, scales, max(block, 1), 4, sixteen_bits(factor, config), factor=float(factor))
    levels = tensors.get(name, ["F8_E4M3"], 2)
    scales = tensors.get(f"{name}_scale", ["F32", "F16", "BF16"])
    N = len(levels)
    if scales.numel() not in (1, N):
        raise tensors.error(f"holds {name}_scale with {scales.numel()} values for {N} rows; download it again")
    rows = scales.float().reshape(-1, 1).expand(N, 1)
    return PackedMatrix(levels, rows, 0, 8, sixteen_bits(scales, config))
