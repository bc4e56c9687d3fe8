"""The adapter: the result of training as JSON and safetensors in one directory; and its held-out losses."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from coatrt import __version__
from coatrt.adapter.description import ADAPTER_FORMAT, AdapterDescription, AdapterFile, adapter_reading
from coatrt.adapter.features import ConfigEncoder
from coatrt.adapter.lora import CoaLora
from coatrt.adapter.peft_format import write_peft
from coatrt.configs.config import QuantConfig
from coatrt.data.task_data import TaskData
from coatrt.errors import CheckpointError, ConfigError
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.evaluation.losses import example_losses, measure_held_out
from coatrt.models.checkpoint import Checkpoint
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.input_moments import Calibration
from coatrt.quantization.learned_scales import LearnedScales
from coatrt.quantization.quantizers import CALIBRATED
from coatrt.system.exclusive import exclusive
from coatrt.system.files import atomic_directory, check_replaceable, sha256_file
from coatrt.system.json_data import write_json
from coatrt.system.progress import Progress, silent
from coatrt.system.resources import compute_device

__all__ = ["Adapter", "Evaluator"]

_CALIBRATION = "calibration.safetensors"
_SCALES = "scales.safetensors"
_FILES = ("adapter.json", "adapter.safetensors", "sensitivity.json", "metrics.json", _CALIBRATION, _SCALES)
_OWN = (*_FILES, "peft", "training", "archive.json")


@dataclass(frozen=True)
class Adapter:
    """A trained configuration-aware LoRA.

    Args:
        description: its model, formats, contract, sensitivities and training.
        lora: A, B, θ and the table of C.
        calibration: the tokens of the second moments; None only if the quantizer needs none.
        scales: scales learned in place of the quantizer's; None: there are none.

    Raises:
        ConfigError: the quantizer needs calibration tokens and there are none.
    """

    description: AdapterDescription
    lora: CoaLora
    calibration: Calibration | None = None
    scales: LearnedScales | None = None

    def __post_init__(self) -> None:
        quantizer = self.description.quantizer
        if quantizer in CALIBRATED and self.calibration is None:
            raise ConfigError(f"the quantizer {quantizer} needs calibration tokens; give some")

    @property
    def encoder(self) -> ConfigEncoder:
        """Encoder of the hypernetwork's inputs."""
        return self.lora.encoder

    def emit(self, config: QuantConfig) -> dict[str, Tensor]:
        """Return the LoRA of a configuration: every tensor of the contract, float32.

        Raises:
            ConfigError: the configuration uses a format the adapter was not trained for.
        """
        return self.lora.emit(config)

    def checkpoint(self, source: str | Path | None = None) -> Checkpoint:
        """Open the model that the adapter was trained on.

        Args:
            source: its current path or hub name; by default that of training.

        Raises:
            CheckpointError: it does not exist, or is another model.
        """
        source = source if source is not None else self.description.source
        checkpoint = Checkpoint.open(source)
        if checkpoint.fingerprint != self.description.fingerprint:
            raise CheckpointError(
                f"{source} has the fingerprint {checkpoint.fingerprint}, the adapter was trained on "
                f"{self.description.fingerprint}; give the model it was trained on (--model)"
            )
        return checkpoint

    def codes(self, checkpoint: Checkpoint, progress: Progress = silent, device: str = "cpu") -> CodeStore:
        """Return the encoded matrices that the adapter was trained on, from the user's cache or encoded again.

        Args:
            checkpoint: its model, see `Adapter.checkpoint`.
            progress: called while second moments are measured.
            device: torch device that encodes matrices missing in the cache.
        """
        return CodeStore(checkpoint, self.description.quantizer, self.calibration, progress, device, self.scales)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the adapter to `directory`, atomically; its folder peft has A and B for PEFT, without θ and C.

        It replaces an adapter or unfinished training there, including the archive; other files stay.

        Raises:
            ConfigError: the directory is in use by a training or search, or cannot be written.
        """
        check_replaceable(Path(directory))
        with exclusive(directory):
            self.write(directory)

    def write(self, directory: str | Path) -> None:
        """Write the adapter like `save_pretrained`; the caller holds the lock on `directory`."""
        description = self.description
        with atomic_directory(directory, _OWN) as temporary:
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.lora.state_dict().items()}
            save_file(state, str(temporary / "adapter.safetensors"))
            write_json(temporary / "sensitivity.json", description.sensitivity)
            write_json(temporary / "metrics.json", description.metrics)
            if self.calibration is not None:
                self.calibration.save(temporary / _CALIBRATION)
            if self.scales is not None:
                self.scales.save(temporary / _SCALES)
            pairs = {
                name: (A.float().cpu().numpy(), B.float().cpu().numpy()) for name, (A, B) in self.lora.shared().items()
            }
            write_peft(temporary / "peft", pairs, description.contract, description.source)
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            write_json(
                temporary / "adapter.json",
                AdapterFile(
                    ADAPTER_FORMAT,
                    __version__,
                    description.own,
                    self.lora.preset,
                    self.lora.compensated,
                    {path.relative_to(temporary).as_posix(): sha256_file(path) for path in files},
                ),
                sealed=True,
            )

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "Adapter":
        """Read an adapter; the hash of every file is checked before it is parsed.

        Raises:
            CheckpointError: it is missing, unfinished, damaged, or of another format.
        """
        directory = Path(directory)
        description, file = AdapterDescription.load(directory), AdapterFile.load(directory)
        has_calibration = _CALIBRATION in file.sha256
        with adapter_reading(directory, file.sha256, {"adapter.safetensors", *file.sha256}):
            lora = CoaLora(
                description.contract,
                ConfigEncoder(description.model, description.formats, description.sensitivity.errors),
                file.preset,
                compensated=file.compensated,
            )
            lora.load_state_dict(load_file(str(directory / "adapter.safetensors")))
            return cls(
                description,
                lora.eval().requires_grad_(False),
                Calibration.load(directory / _CALIBRATION) if has_calibration else None,
                LearnedScales.load(directory / _SCALES) if _SCALES in file.sha256 else None,
            )


class Evaluator:
    """The base model of an adapter in memory, to be measured in any configuration.

    Args:
        adapter: the adapter with the model, its encoded weights and the LoRA contract.
        model: current path or hub name of the model; by default that of training.
        device: torch device, such as "cpu" or "cuda".
        progress: called while second moments are measured.

    Raises:
        CheckpointError: the model does not exist, or is another model.
        ConfigError: there is no such device.
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
        checkpoint = adapter.checkpoint(model)
        dtype = getattr(torch, adapter.description.metrics["options"]["precision"])
        self._contract, self._rows = adapter.description.contract, checkpoint.matrices.matrices[0].N
        self._model = FakeQuantModel(checkpoint, adapter.codes(checkpoint, progress, device), device, dtype=dtype)

    def measure(
        self,
        config: QuantConfig | None,
        data: TaskData,
        lora: Mapping[str, Tensor | NDArray[np.float32]] | None = None,
    ) -> dict[str, float]:
        """Return {"loss": nats per predicted token}, and for choice tasks "accuracy" (share of questions).

        Args:
            config: the configuration; None: full precision.
            data: data with the held-out examples.
            lora: every tensor of the contract, from `Adapter.emit` or `load_lora`; None: no LoRA.

        Raises:
            ConfigError: the data contain a token without a row in the embedding.
        """
        self._set(config, data, lora)
        return measure_held_out(self._model, data)

    def example_losses(
        self,
        config: QuantConfig | None,
        data: TaskData,
        lora: Mapping[str, Tensor | NDArray[np.float32]] | None = None,
    ) -> NDArray[np.float64]:
        """Return the loss of each held-out example, nats per predicted token [n], for paired comparisons.

        For the arguments and errors see `measure`, whose loss is their mean, weighted by predicted tokens.
        """
        self._set(config, data, lora)
        return example_losses(self._model, data.held_out).numpy()

    def _set(
        self,
        config: QuantConfig | None,
        data: TaskData,
        lora: Mapping[str, Tensor | NDArray[np.float32]] | None,
    ) -> None:
        """Give the model a configuration and a LoRA."""
        data.check_rows(self._rows)
        tensors = None if lora is None else {name: torch.as_tensor(value) for name, value in lora.items()}
        self._model.set_config(config)
        self._model.set_lora(self._contract, tensors)
