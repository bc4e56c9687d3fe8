"""Writes quantized checkpoints of a tiny model, packed as their own tools publish it, independently of coatrt."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from support.tiny import save_tiny_llama

Tensors = dict[str, torch.Tensor]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def base_model(directory: Path, **changes: object) -> Path:
    """Save a tiny Llama in bfloat16 whose widths are multiples of 128."""
    options: dict[str, object] = {"hidden_size": 128, "intermediate_size": 256, "tied": False, "dtype": "bfloat16"}
    save_tiny_llama(directory, **{**options, **changes})  # type: ignore[arg-type]
    tensors = load_file(directory / "model.safetensors")
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_quantized(
    base: Path,
    directory: Path,
    quantization: Mapping[str, Any],
    pack: Callable[[str, torch.Tensor], Tensors | None],
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint whose linear layers are packed.

    Args:
        base: a plain model.
        directory: where to write.
        quantization: quantization_config; empty: none is written.
        pack: (module, float32 weight [N, K]) → its tensors by their last names, or None to leave it plain.
        config: keys of config.json to change.
    """
    shutil.copytree(base, directory)
    tensors: Tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        is_linear = tensor.ndim == 2 and module != "model.embed_tokens"
        packed = pack(module, tensor.float()) if is_linear else None
        if packed is None:
            tensors[name] = tensor
        else:
            tensors |= {f"{module}.{part}": value.contiguous() for part, value in packed.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((base / "config.json").read_text()) | dict(config or {})
    if quantization:
        values["quantization_config"] = dict(quantization)
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def integers(weight: torch.Tensor, bits: int, group: int, symmetric: bool, dtype: torch.dtype) -> Tensors:
    """Return codes from 0 [N, K], scales [N, groups] and zero points [N, groups] of a weight, by its range."""
    N, K = weight.shape
    blocks = weight.reshape(N, K // group, group)
    top = (1 << bits) - 1
    if symmetric:
        scale = (blocks.abs().amax(-1) / (top // 2)).to(dtype)
        zero = torch.full(scale.shape, 1 << (bits - 1))
    else:
        low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
        scale = ((high - low) / top).to(dtype)
        zero = (-low / scale.float()).round().clamp(0, top).long()
    codes = (blocks / scale.float()[..., None]).round() + zero[..., None]
    return {"codes": codes.clamp(0, top).long().view(N, K), "scale": scale, "zero": zero}


def value(parts: Tensors, group: int) -> torch.Tensor:
    """Return (code − zero) × scale, float32."""
    N, K = parts["codes"].shape
    levels = parts["codes"].view(N, -1, group) - parts["zero"][..., None]
    return (levels.float() * parts["scale"].float()[..., None]).view(N, K)


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes along their last axis into int32, each row one stream of bits: one Python integer a row."""
    rows = []
    for row in codes.tolist():
        whole = sum(code << (bits * i) for i, code in enumerate(row))
        rows.append([(whole >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(row) * bits // 32))])
    return torch.from_numpy(np.array(rows, np.uint32).view(np.int32))


def gptq(parts: Tensors, bits: int, *, version: int, order: torch.Tensor | None = None, group: int = 128) -> Tensors:
    """Return qweight, qzeros, scales and g_idx of AutoGPTQ's layout; version 1 stores zero points less one."""
    K = parts["codes"].shape[1]
    zeros = parts["zero"] - (1 if version == 1 else 0)
    return {
        "qweight": words(parts["codes"], bits).t(),
        "qzeros": words(zeros.t() & ((1 << bits) - 1), bits),
        "scales": parts["scale"].t(),
        "g_idx": (torch.arange(K) // group if order is None else order).int(),
    }


def awq(parts: Tensors) -> Tensors:
    """Return qweight, qzeros and scales of AutoAWQ's gemm layout: bits 4i of word j hold the column 8j + ORDER[i]."""

    def pack(columns: torch.Tensor) -> torch.Tensor:
        packed = np.zeros((columns.shape[0], columns.shape[1] // 8), np.uint32)
        for j in range(packed.shape[1]):
            for i, column in enumerate(AWQ_ORDER):
                packed[:, j] |= columns[:, 8 * j + column].numpy().astype(np.uint32) << np.uint32(4 * i)
        return torch.from_numpy(packed.view(np.int32))

    return {"qweight": pack(parts["codes"].t()), "qzeros": pack(parts["zero"].t()), "scales": parts["scale"].t()}


def nvfp4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Return weight, weight_scale and weight_scale_2 of ModelOpt's layout, and the float32 values they stand for."""
    N, K = weight.shape
    factor = (weight.abs().max() / (6 * 448)).float()
    blocks = weight.view(N, K // 16, 16)
    scale = (blocks.abs().amax(-1) / 6 / factor).clamp(max=448).to(torch.float8_e4m3fn)
    effective = scale.float() * factor
    levels = torch.tensor(E2M1)
    codes = (blocks.abs() / effective[..., None] - levels.view(-1, 1, 1, 1)).abs().argmin(0)
    values = levels[codes] * blocks.sign() * effective[..., None]
    codes = (codes | ((blocks < 0).long() << 3)).view(N, K)
    packed = (codes[:, 0::2] | (codes[:, 1::2] << 4)).to(torch.uint8)
    return {"weight": packed, "weight_scale": scale, "weight_scale_2": factor}, values.view(N, K)


def write_methods(here: Path) -> None:
    """Write a tiny checkpoint of each method into folders named like it: gptq, awq, compressed-tensors, modelopt."""
    base = base_model(here / "unquantized", num_hidden_layers=1)

    def int4(weight: torch.Tensor) -> Tensors:
        return integers(weight, 4, 128, True, torch.float16)

    def tensors(weight: torch.Tensor) -> Tensors:
        parts = int4(weight)
        shape = torch.tensor(weight.shape)
        return {"weight_packed": words(parts["codes"], 4), "weight_scale": parts["scale"], "weight_shape": shape}

    arguments = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    group = {"targets": ["Linear"], "weights": arguments, "input_activations": None, "output_activations": None}
    whole: dict[str, Any] = {"format": "pack-quantized", "version": "0.9.1", "config_groups": {"group_0": group}}
    whole |= {"ignore": ["re:.*lm_head"], "quantization_status": "compressed", "kv_cache_scheme": None}
    settings: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], Tensors]]] = {
        "gptq": ({"bits": 4, "group_size": 128, "dynamic": {"-:.*head": {}}}, lambda w: gptq(int4(w), 4, version=1)),
        "awq": ({"bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}, lambda w: awq(int4(w))),
        "compressed-tensors": (whole, tensors),
        "modelopt": ({"quant_algo": "NVFP4", "ignore": ["lm_head"]}, lambda w: nvfp4(w)[0]),
    }
    for method, (values, layout) in settings.items():

        def pack(module: str, weight: torch.Tensor, layout: Any = layout) -> Tensors | None:
            return None if module == "lm_head" else layout(weight)  # type: ignore[no-any-return]

        write_quantized(base, here / method, {"quant_method": method, **values}, pack)
    shutil.rmtree(base)
