"""The PEFT file format, a LoRA for `peft.PeftModel.from_pretrained`."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from coatrt.configs.lora_contract import LoraContract
from coatrt.system.files import atomic_directory
from coatrt.system.json_data import write_json

__all__ = ["write_emitted_peft", "write_peft"]


def write_peft(
    directory: str | Path,
    pairs: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]],
    contract: LoraContract,
    base_model: str,
    configuration: str = "",
) -> None:
    """Write a directory with adapter_config.json and adapter_model.safetensors, atomically.

    Args:
        directory: where to write.
        pairs: matrix name → float32 (A [K, r], B [r, N]), alpha/rank not folded into B: PEFT applies it.
        contract: rank, alpha and names.
        base_model: name or path of the base model, for information.
        configuration: hash of their configuration, stored in the metadata; empty if they are for all.
    """
    tensors = {}
    for tensor in contract.tensors:
        a, b = pairs[tensor.matrix]
        tensors[f"base_model.model.{tensor.matrix}.lora_A.weight"] = np.ascontiguousarray(a.T)
        tensors[f"base_model.model.{tensor.matrix}.lora_B.weight"] = np.ascontiguousarray(b.T)
    with atomic_directory(directory, ("adapter_config.json", "adapter_model.safetensors")) as temporary:
        metadata = {"format": "pt"} | ({"configuration": configuration} if configuration else {})
        save_file(tensors, str(temporary / "adapter_model.safetensors"), metadata=metadata)
        write_json(
            temporary / "adapter_config.json",
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": base_model,
                "r": contract.rank,
                "rank_pattern": {t.matrix: t.rank for t in contract.tensors if t.rank != contract.rank},
                "lora_alpha": contract.alpha,
                "lora_dropout": 0.0,
                "bias": "none",
                "target_modules": sorted({tensor.matrix for tensor in contract.tensors}),
                "inference_mode": True,
            },
        )


def write_emitted_peft(
    directory: str | Path,
    tensors: Mapping[str, NDArray[np.float32]],
    contract: LoraContract,
    base_model: str,
    configuration: str = "",
) -> None:
    """Write emitted tensors as a PEFT adapter; B is divided by alpha/rank, which PEFT applies itself.

    Args:
        directory: the directory to write.
        tensors: every tensor of the contract.
        contract: names, rank and alpha.
        base_model: name of the base model, for the adapter's config.
        configuration: hash of the tensors' configuration; by default the one that they name themselves.
    """
    pairs = {t.matrix: (tensors[t.A], tensors[t.B] / np.float32(contract.scale(t))) for t in contract.tensors}
    write_peft(directory, pairs, contract, base_model, configuration or getattr(tensors, "configuration", ""))
