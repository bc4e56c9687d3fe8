"""Emitted LoRA tensors in the file formats of others: PEFT and ONNX Runtime's adapter file."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coatrt.configs.lora_contract import LoraContract
from coatrt.system.files import atomic_file

__all__ = ["write_emitted_peft", "write_onnx_adapter"]


def write_emitted_peft(
    directory: str | Path, tensors: Mapping[str, NDArray[np.float32]], contract: LoraContract, base_model: str
) -> None:
    """Write emitted tensors as a PEFT adapter; alpha/rank is taken out of B again, for PEFT applies it.

    Args:
        directory: where to write.
        tensors: every tensor of the contract.
        contract: names, rank and alpha.
        base_model: kept as information.
    """
    import torch

    from coatrt.adapter.peft_format import write_peft

    pairs = {
        t.matrix: (
            torch.from_numpy(tensors[t.A].copy()),
            torch.from_numpy(tensors[t.B] / np.float32(contract.scale(t))),
        )
        for t in contract.tensors
    }
    write_peft(directory, pairs, contract, base_model)


def write_onnx_adapter(path: str | Path, tensors: Mapping[str, NDArray[np.float32]]) -> None:
    """Write emitted tensors as ONNX Runtime's `.onnx_adapter`, which `RunOptions.add_active_adapter` takes."""
    import onnxruntime as ort

    adapter = ort.AdapterFormat()
    adapter.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in tensors.items()})
    with atomic_file(path) as temporary:
        adapter.export_adapter(str(temporary))
