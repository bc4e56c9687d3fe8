"""Held-out numbers of an adapter's configurations, with a LoRA or without."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coatrt.adapter.adapter import Adapter
from coatrt.configs.config import QuantConfig
from coatrt.data.task_data import TaskData
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.evaluation.losses import measure_held_out
from coatrt.system.progress import Progress, silent
from coatrt.system.resources import compute_device

__all__ = ["Evaluator"]


class Evaluator:
    """The base model of an adapter in memory, ready to be measured in any configuration.

    Args:
        adapter: gives the model, its encoded weights and the LoRA contract.
        model: where the adapter's model is now; by default where it was at training.
        device: torch device, such as "cpu" or "cuda".
        progress: called while second moments are measured.

    Raises:
        CheckpointError: the model is not there, or it is another one.
        ConfigError: the device is not there.
    """

    def __init__(
        self,
        adapter: Adapter,
        *,
        model: str | Path | None = None,
        device: str = "cpu",
        progress: Progress = silent,
    ) -> None:
        compute_device(device)
        checkpoint, description = adapter.checkpoint(model), adapter.description
        dtype = getattr(torch, description.metrics["options"]["precision"])
        self._contract = description.contract
        self._model = FakeQuantModel(checkpoint, adapter.codes(checkpoint, progress), device, dtype=dtype)

    def measure(
        self,
        config: QuantConfig | None,
        data: TaskData,
        lora: Mapping[str, Tensor | NDArray[np.float32]] | None = None,
    ) -> dict[str, float]:
        """Return {"loss": nats per predicted token}, and for choice tasks "accuracy" (share of questions).

        Args:
            config: the configuration; None is full precision.
            data: its held-out examples are measured on.
            lora: every tensor of the contract, as `Adapter.emit` and `load_lora` give them; None is no LoRA.
        """
        tensors = None if lora is None else {name: torch.as_tensor(value) for name, value in lora.items()}
        self._model.set_config(config)
        self._model.set_lora(self._contract, tensors)
        return measure_held_out(self._model, data)
