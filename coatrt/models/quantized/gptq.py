"""GPTQ checkpoints (AutoGPTQ, GPTQModel): versions 1 and 2 of the zero points, groups in any order."""

import functools
from collections.abc import Mapping
from typing import Any

import torch

from coatrt.errors import CheckpointError
from coatrt.models.quantized.bits import unpack_words
from coatrt.models.quantized.matrix import PackedMatrix
from coatrt.models.quantized.reading import Reading, Tensors, check_keys, matches, sixteen_bits

__all__ = ["read_gptq"]

_BITS = (2, 3, 4, 8)
_HOW = (  # how the codes were found or how kernels run: of no effect on what is stored
    *("damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "model_name_or_path", "dataset"),
    *("model_file_base_name", "meta", "tokenizer", "batch_size", "pad_token_id", "use_exllama", "use_cuda_fp16"),
    *("max_input_length", "exllama_config", "cache_block_outputs", "model_seqlen", "backend", "disable_exllama"),
    *("block_name_to_quantize", "module_name_preceding_first_block", "modules_in_block_to_quantize", "mse"),
    *("device", "format_v2", "act_group_aware", "offload_to_disk", "hyb_act", "quantizer"),
)
_KEYS = (
    *("quant_method", "bits", "group_size", "desc_act", "sym", "lm_head", "dynamic", "checkpoint_format", "format"),
    *("method", "is_marlin_format", "pack_dtype", *_HOW),
)
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def read_gptq(config: Mapping[str, Any], quantization: Mapping[str, Any], tensors: Tensors) -> Reading:
    """Return what a GPTQ checkpoint holds; which modules are quantized, the files say.

    Args:
        config: content of config.json.
        quantization: its quantization_config.
        tensors: the tensors of the files.

    Raises:
        CheckpointError: a key, version or tensor is unknown, or configuration and files differ.
    """
    where = f"quantization_config of {tensors.directory}"
    check_keys(where, quantization, _KEYS)
    for key in ("checkpoint_format", "format"):
        if quantization.get(key, "gptq") not in ("gptq", "gptq_v2", "", None):
            raise CheckpointError(
                f"{where} has the {key} {quantization[key]!r}; allowed: gptq, gptq_v2; give the model in one of them"
            )
    layout = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    if quantization.get("is_marlin_format") or quantization.get("pack_dtype", "int32") != "int32":
        raise CheckpointError(f"{where} packs codes for Marlin or not in int32; give the model in plain GPTQ")
    if quantization.get("method", "gptq") not in ("gptq", None):
        raise CheckpointError(f"{where} has the method {quantization['method']!r}; allowed: gptq")
    overrides = quantization.get("dynamic") or {}
    if not isinstance(overrides, dict):
        raise CheckpointError(f"{where}: dynamic is not an object; download the model again")
    matrices, used = {}, set()
    for module in tensors.modules("qweight"):
        bits, group = _settings(where, module, quantization, overrides)
        matrices[module] = functools.partial(_read, tensors, module, bits, group, layout == "gptq", config)
        used |= {f"{module}.{part}" for part in _PARTS if f"{module}.{part}" in tensors}
    return Reading("GPTQ" if layout == "gptq" else "GPTQ v2", matrices, frozenset(used))


def _settings(
    where: str, module: str, quantization: Mapping[str, Any], overrides: Mapping[str, Any]
) -> tuple[int, int]:
    """Return bits and group size of a module; 0: one group for each row."""
    values = {"bits": quantization.get("bits"), "group_size": quantization.get("group_size", -1)}
    for pattern, changes in overrides.items():
        if pattern.startswith("-:"):
            if matches(pattern.removeprefix("-:"), module):
                raise CheckpointError(
                    f"{where}: dynamic excludes {module}, the files hold it quantized; download again"
                )
        elif matches(pattern.removeprefix("+:"), module):
            values |= check_keys(
                f"{where}: dynamic {pattern!r}", changes, ("bits", "group_size", "desc_act", "sym", *_HOW)
            )
            break
    bits, group = values["bits"], values["group_size"]
    if type(bits) is not int or bits not in _BITS or type(group) is not int or not (group == -1 or group > 0):
        raise CheckpointError(
            f"{where} asks for {bits} bits in groups of {group} for {module}; allowed: {', '.join(map(str, _BITS))} "
            "bits, groups of 1 or more, -1 for whole rows"
        )
    return bits, max(group, 0)


def _read(
    tensors: Tensors, module: str, bits: int, group: int, first_version: bool, config: Mapping[str, Any]
) -> PackedMatrix:
    packed = tensors.get(f"{module}.qweight", ["I32"], 2)  # [K · bits / 32, N]
    zeros = tensors.get(f"{module}.qzeros", ["I32"], 2)  # [groups, N · bits / 32]
    stored = tensors.get(f"{module}.scales", ["F16", "BF16", "F32"], 2)  # [groups, N]
    levels = unpack_words(packed.t(), bits).short()
    N, K = levels.shape
    points = unpack_words(zeros, bits).short()[:, :N]
    if first_version:  # stored less one; AutoGPTQ's reader drops what runs over
        points = (points + 1) & ((1 << bits) - 1)
    width = min(group or K, K) or 1
    if points.shape != stored.shape or stored.shape != (-(-K // width), N):
        raise tensors.error(
            f"holds {module} [{N}, {K}] in groups of {width} with scales {list(stored.shape)} and zero points "
            f"{list(zeros.shape)}; download it again"
        )
    order = tensors.get(f"{module}.g_idx", ["I32", "I64"], 1).long() if f"{module}.g_idx" in tensors else None
    if order is not None and (len(order) != K or not bool(((order >= 0) & (order < len(stored))).all())):
        raise tensors.error(f"holds {module}.g_idx with groups that {module} does not have; download it again")
    levels -= points.t()[:, order if order is not None else torch.arange(K) // width]
    return PackedMatrix(levels, stored.t().float().contiguous(), group, bits, sixteen_bits(stored, config), order)
